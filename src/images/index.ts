/** Images: reading them by URL, putting them into rows, and the pixel arithmetic of vision models. */

export type { ImageType } from "../data/mime.js";
export { toDataUrl } from "./data-url.js";
export { imagesToBase64, imagesToBase64InText, loadImage } from "./embed.js";
export { ImageLoader, type ImageOptions, type LoadedImage } from "./loader.js";
export {
	type ImageGrid,
	imageGrid,
	type PixelBounds,
	smart_resize,
	VISION_GRIDS,
	type VisionGrid,
} from "./pixels.js";
export { type ImageSize, imageSize } from "./size.js";
