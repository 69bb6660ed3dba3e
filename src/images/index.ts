/** The entry `arl/images`: loads images by URL and embeds them in rows. */

export type { ImageType } from "../data/mime.js";
export { toDataUrl } from "./data-url.js";
export { imagesToBase64, imagesToBase64InText, loadImage } from "./embed.js";
export { ImageLoader, type ImageOptions, type LoadedImage } from "./loader.js";
export { type ImageSize, imageSize } from "./size.js";
