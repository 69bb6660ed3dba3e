/** The entries of the package by the names under which modules import them. */
import * as images from "../images/index.js";
import * as arl from "./index.js";
import * as mongo from "./mongo.js";

export const entries = { arl, "arl/images": images, "arl/mongo": mongo };
