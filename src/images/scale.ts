/** Scales images down with `sharp`, which is loaded only when an image has too many pixels. */
import { type ImageType, imageType } from "../data/mime.js";
import { ArlError, messageOf } from "../errors.js";
import type { ImageSize } from "./size.js";

/** Loads sharp, or throws with instructions for installing it. */
async function loadSharp() {
	try {
		return (await import("sharp")).default;
	} catch (error) {
		const reason = messageOf(error).split("\n")[0];
		throw new ArlError(
			"ARL_CONFIG",
			`max_pixels needs the package sharp, which cannot be loaded: ${reason}`,
			"Install it next to arl: npm install sharp. Without max_pixels images stay as they are.",
			{ cause: error },
		);
	}
}

/** The largest size of the same shape with at most `maxPixels`; the size itself if it has no more. */
export function sizeWithin({ width, height }: ImageSize, maxPixels: number): ImageSize {
	if (width * height <= maxPixels) return { width, height };
	const beta = Math.sqrt((width * height) / maxPixels);
	// Where one side is clamped to 1, the shape cannot be kept: the limit holds for the other side.
	const rows = Math.min(maxPixels, Math.max(1, Math.floor(height / beta)));
	const columns = Math.max(1, Math.min(Math.floor(width / beta), Math.floor(maxPixels / rows)));
	return { width: columns, height: rows };
}

/** Formats that keep their type; the others become PNG. */
const SAME: ReadonlySet<ImageType> = new Set<ImageType>(["image/png", "image/jpeg", "image/webp"]);

/**
 * The image scaled to `size` and rotated as its metadata says; the first frame of an animation; JPEG and WebP at quality 95.
 * Throws `ARL_DATA` if it cannot be decoded.
 */
export async function scaleImage(
	bytes: Uint8Array,
	type: ImageType,
	size: ImageSize,
): Promise<{ bytes: Uint8Array; content_type: ImageType }> {
	const sharp = await loadSharp();
	try {
		const scaled = sharp(bytes, { failOn: "error" })
			.autoOrient()
			.resize({ ...size, fit: "fill", kernel: "cubic" });
		const written = SAME.has(type) ? scaled : scaled.png();
		const result = await written.jpeg({ quality: 95, force: false }).webp({ quality: 95, force: false }).toBuffer();
		const found = imageType(result);
		if (found === null) throw new Error("the scaled image is of an unknown type");
		return { bytes: result, content_type: found };
	} catch (error) {
		const reason = messageOf(error);
		throw new ArlError(
			"ARL_DATA",
			`the ${type} cannot be scaled down: ${reason}`,
			"Convert it to PNG or JPEG, or raise max_pixels.",
			{ cause: error },
		);
	}
}
