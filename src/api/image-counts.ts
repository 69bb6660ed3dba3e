/** Images of checked rows: how many, how large, how many tokens, and which are resized. */
import type { PictureLoader } from "../data/tokens/pictures.js";
import type { ImageProcessorInfo } from "../native.js";
import { type LengthSummary, summarize } from "./length-summary.js";

/** Images of rows. */
export interface ImageReport {
	images: number;
	/** Rows that have any. */
	rows: number;
	/** Tokens of an image. */
	tokens: LengthSummary;
	/** Pixels of an image, before it is resized. */
	pixels: LengthSummary;
	/** Images that have more pixels than the processor's bound, and fewer than it: they are scaled down, and up. */
	downscaled: number;
	upscaled: number;
}

/** Counts the images of each row once. */
export class ImageCounts {
	private readonly tokens: number[] = [];
	private readonly pixels: number[] = [];
	private rows = 0;

	/** The same loader; what it measures is counted. */
	counting(loader: PictureLoader): PictureLoader {
		return {
			count: (row) => loader.count(row),
			prepare: (row, wanted) => loader.prepare(row, wanted),
			patches: (height, width) => loader.patches(height, width),
			patchesOfToken: loader.patchesOfToken,
			measure: async (row) => {
				const images = await loader.measure(row);
				if (images.length > 0) this.rows += 1;
				for (const image of images) {
					this.tokens.push(image.tokens);
					this.pixels.push(image.width * image.height);
				}
				return images;
			},
		};
	}

	/** What was counted so far. */
	report({ minPixels, maxPixels }: Pick<ImageProcessorInfo, "minPixels" | "maxPixels">): ImageReport {
		return {
			images: this.tokens.length,
			rows: this.rows,
			tokens: summarize(Uint32Array.from(this.tokens)),
			pixels: summarize(Uint32Array.from(this.pixels)),
			downscaled: this.pixels.filter((pixels) => pixels > maxPixels).length,
			upscaled: this.pixels.filter((pixels) => pixels < minPixels).length,
		};
	}
}
