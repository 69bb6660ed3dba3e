/** Replaces the image URLs of a row by the images themselves, as base64 `data:` URLs: the form that exports use. */
import type { ContentPart, RecordData } from "../data/sources/record.js";
import { ArlError } from "../errors.js";
import { toDataUrl } from "./data-url.js";
import { ImageLoader, type ImageOptions, type LoadedImage } from "./loader.js";
import { contentParts, type Range, replaceRanges } from "./parts.js";

/** Loads one image. For many, use an `ImageLoader`, which reuses connections and shares limits. @throws as `ImageLoader.load`. */
export async function loadImage(url: string, options: ImageOptions = {}): Promise<LoadedImage> {
	const loader = new ImageLoader(options);
	try {
		return await loader.load(url);
	} finally {
		await loader.close();
	}
}

function withoutUrl(place: string): ArlError {
	return new ArlError(
		"ARL_DATA",
		`${place}: a part of type image_url without a URL`,
		'A part looks like {"type": "image_url", "image_url": {"url": "https://..."}}.',
	);
}

async function dataUrl(loader: ImageLoader, url: string, place: string): Promise<string> {
	try {
		return toDataUrl(await loader.load(url));
	} catch (error) {
		if (!(error instanceof ArlError) || error.code !== "ARL_DATA") throw error;
		throw new ArlError(error.code, `${place}: ${error.message}`, error.hint, { cause: error });
	}
}

/**
 * A copy of the row with every `image_url` of its messages as a base64 `data:` URL, whose media type is that of its bytes.
 *
 * @throws ArlError `ARL_DATA` with the part's place if an image cannot be loaded.
 */
export async function imagesToBase64(row: RecordData, from: ImageLoader | ImageOptions = {}): Promise<RecordData> {
	const loader = from instanceof ImageLoader ? from : new ImageLoader(from);
	const embed = async (part: ContentPart, place: string): Promise<ContentPart> => {
		if (part.type !== "image_url") return part;
		// JavaScript callers may pass rows of another shape.
		if (typeof part.image_url?.url !== "string") throw withoutUrl(place);
		return { ...part, image_url: { ...part.image_url, url: await dataUrl(loader, part.image_url.url, place) } };
	};
	try {
		const messages = await Promise.all(
			row.messages.map(async (message, i) => {
				if (!Array.isArray(message.content)) return message;
				const parts = message.content.map((part, j) => embed(part, `messages[${i}].content[${j}]`));
				return { ...message, content: await Promise.all(parts) };
			}),
		);
		return { ...row, messages };
	} finally {
		if (loader !== from) await loader.close();
	}
}

/**
 * The same for a row's JSON text: every byte except the URLs stays, and a row without images is returned as it is. Returns
 * the number of images with it. `columns`: the file's names of known columns.
 *
 * @throws as `imagesToBase64`.
 */
export async function imagesToBase64InText(
	row: Uint8Array,
	loader: ImageLoader,
	columns: Readonly<Record<string, string>> = {},
): Promise<{ row: Uint8Array; images: number }> {
	const found: { range: Range; url: string; place: string }[] = [];
	const text = Buffer.from(row.buffer, row.byteOffset, row.byteLength);
	for (const { type, url: range, place } of contentParts(row, columns)) {
		if (type !== "image_url") continue;
		if (range === null) throw withoutUrl(place);
		found.push({ range, url: String(JSON.parse(text.toString("utf8", range.start, range.end))), place });
	}
	if (found.length === 0) return { row, images: 0 };
	const replaced = found.map(async ({ range, url, place }) => ({
		range,
		by: Buffer.from(JSON.stringify(await dataUrl(loader, url, place))),
	}));
	return { row: replaceRanges(row, await Promise.all(replaced)), images: found.length };
}
