/**
 * The pixel arithmetic of Qwen's vision models, equal to that of transformers: to which size an image is brought, and how many
 * tokens it then is. Pure numbers; nothing is decoded here.
 */
import { ArlError } from "../errors.js";
import type { ImageSize } from "./size.js";

/** A family of vision models, as its image processor is set up. */
export interface VisionGrid {
	/** Side of a patch in pixels. */
	patch_size: number;
	/** Patches a side that become one token. */
	merge_size: number;
}

/** The patches of the families. */
export const VISION_GRIDS = {
	qwen2_vl: { patch_size: 14, merge_size: 2 },
	qwen2_5_vl: { patch_size: 14, merge_size: 2 },
	qwen3_vl: { patch_size: 16, merge_size: 2 },
} as const satisfies Record<string, VisionGrid>;

/** Bounds of an image's pixels. */
export interface PixelBounds {
	min_pixels?: number;
	max_pixels?: number;
}

const MAX_RATIO = 200;

/** Python's `round`: halves go to the even neighbour. */
function roundHalfEven(value: number): number {
	const low = Math.floor(value);
	const rest = value - low;
	if (rest !== 0.5) return Math.round(value);
	return low % 2 === 0 ? low : low + 1;
}

/**
 * The size that an image is brought to: both sides divisible by `factor`, the pixels within the bounds, the ratio of the sides
 * as close as can be. The defaults of the bounds are those of the function of this name in transformers; a model's own stand
 * in its `preprocessor_config.json`.
 *
 * @throws ArlError `ARL_DATA` where one side is more than 200 times the other.
 */
export function smart_resize(
	height: number,
	width: number,
	factor = 28,
	min_pixels = 56 * 56,
	max_pixels = 14 * 14 * 4 * 1280,
): ImageSize {
	const ratio = Math.max(height, width) / Math.min(height, width);
	// A side of 0 gives no ratio at all.
	if (!(ratio <= MAX_RATIO)) {
		throw new ArlError(
			"ARL_DATA",
			`an image of ${width} x ${height} pixels: one side is more than ${MAX_RATIO} times the other`,
			"Cut the image.",
		);
	}
	let h = roundHalfEven(height / factor) * factor;
	let w = roundHalfEven(width / factor) * factor;
	if (h * w > max_pixels) {
		const beta = Math.sqrt((height * width) / max_pixels);
		h = Math.max(factor, Math.floor(height / beta / factor) * factor);
		w = Math.max(factor, Math.floor(width / beta / factor) * factor);
	} else if (h * w < min_pixels) {
		const beta = Math.sqrt(min_pixels / (height * width));
		h = Math.ceil((height * beta) / factor) * factor;
		w = Math.ceil((width * beta) / factor) * factor;
	}
	return { height: h, width: w };
}

/** An image as a vision model sees it. */
export interface ImageGrid extends ImageSize {
	/** Frames, and patches from top to bottom and from left to right. */
	image_grid_thw: [number, number, number];
	/** Places that the image takes in the text. */
	tokens: number;
}

/** Size, patches and tokens of an image. @throws as `smart_resize`. */
export function imageGrid(size: ImageSize, grid: VisionGrid, bounds: PixelBounds = {}): ImageGrid {
	const { patch_size, merge_size } = grid;
	const factor = patch_size * merge_size;
	const resized = smart_resize(size.height, size.width, factor, bounds.min_pixels, bounds.max_pixels);
	const rows = resized.height / patch_size;
	const columns = resized.width / patch_size;
	return { ...resized, image_grid_thw: [1, rows, columns], tokens: (rows * columns) / merge_size ** 2 };
}
