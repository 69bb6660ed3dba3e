/** Makes images smaller with `sharp`, which is loaded only when one has too many pixels. */
import { type ImageType, imageType } from "../data/mime.js";
import { ArlError, messageOf } from "../errors.js";
import type { ImageSize } from "./size.js";

/** Sharp, or what it takes to have it. */
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

/** The largest size of the same shape with at most `maxPixels`; the same size where it has no more. */
export function sizeWithin({ width, height }: ImageSize, maxPixels: number): ImageSize {
	if (width * height <= maxPixels) return { width, height };
	const beta = Math.sqrt((width * height) / maxPixels);
	// A side that cannot go below 1 keeps the other from being as long as the shape asks for.
	const rows = Math.min(maxPixels, Math.max(1, Math.floor(height / beta)));
	const columns = Math.max(1, Math.min(Math.floor(width / beta), Math.floor(maxPixels / rows)));
	return { width: columns, height: rows };
}

/** Formats that are written as they came; the others become PNG. */
const SAME: ReadonlySet<ImageType> = new Set<ImageType>(["image/png", "image/jpeg", "image/webp"]);

/**
 * The image brought to `size`: turned as it is to be shown, the first frame of several, JPEG and WebP at quality 95.
 * Throws `ARL_DATA` where it cannot be decoded.
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
		if (found === null) throw new Error("the scaled image has no type that is known");
		return { bytes: result, content_type: found };
	} catch (error) {
		const reason = messageOf(error);
		throw new ArlError(
			"ARL_DATA",
			`the ${type} cannot be made smaller: ${reason}`,
			"Convert it to PNG or JPEG, raise max_pixels.",
			{ cause: error },
		);
	}
}
