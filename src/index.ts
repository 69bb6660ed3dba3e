/** The entry of `arl` as a library: the public API, also for modules that users name in options. */
import * as api from "./api/index.js";
import { providePublicApi } from "./config/module.js";

export * from "./api/index.js";

providePublicApi(async () => api);
