/** A row's images by URL to the same row with the images in it, as base64 `data:` URLs: what exports write. */
import type { ContentPart, RecordData } from "../data/sources/record.js";
import { ArlError } from "../errors.js";
import { toDataUrl } from "./data-url.js";
import { ImageLoader, type ImageOptions, type LoadedImage } from "./loader.js";
import { contentLists, type Range, replaceRanges } from "./parts.js";

/** Reads one image. For many, an `ImageLoader` keeps connections open and shares limits. @throws as `ImageLoader.load`. */
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
		'A part reads {"type": "image_url", "image_url": {"url": "https://..."}}.',
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
 * The row with every `image_url` of its messages as a base64 `data:` URL whose media type is that of its bytes. The row itself
 * stays as it is.
 *
 * @throws ArlError `ARL_DATA` with the part's place where an image cannot be had.
 */
export async function imagesToBase64(row: RecordData, from: ImageLoader | ImageOptions = {}): Promise<RecordData> {
	const loader = from instanceof ImageLoader ? from : new ImageLoader(from);
	const embed = async (part: ContentPart, place: string): Promise<ContentPart> => {
		if (part.type !== "image_url") return part;
		// Rows of JavaScript are not held to their type.
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
 * The same for a row's JSON text, in which nothing but the URLs changes: the very same bytes where it has no images. `images`:
 * how many it has. `columns`: the file's names of known columns.
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
	for (const { type, url: range, place } of contentLists(row, columns).flat()) {
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
