/** `data:` URLs to bytes and back. The media type that they claim is not believed: images are told by their bytes. */
import { ArlError } from "../errors.js";

function wrong(what: string): ArlError {
	return new ArlError(
		"ARL_DATA",
		what,
		"A data URL reads data:image/png;base64,iVBORw0KGgo..., with the whole image behind the comma.",
	);
}

/** Longest `data:` URL that can hold `maxBytes`: every byte may be written as three. */
export function maxDataUrlLength(maxBytes: number): number {
	return maxBytes * 3 + 1024;
}

/** The bytes of a `data:` URL, with base64 or percent-encoding or both. Throws `ARL_DATA`. */
export function dataUrlBytes(url: string): Uint8Array {
	const text = url.trim();
	const comma = text.indexOf(",");
	if (comma < 0) throw wrong("a data URL without a comma");
	const isBase64 = /;\s*base64\s*$/i.test(text.slice(0, comma));
	const hash = text.indexOf("#", comma);
	const content = percentDecoded(text.slice(comma + 1, hash < 0 ? undefined : hash));
	if (!isBase64) return content;
	const base64 = content.toString("latin1").replace(/[\t\n\f\r ]+/g, "");
	const bare = base64.replace(/={1,2}$/, "");
	const stranger = /[^A-Za-z0-9+/_-]/.exec(bare);
	if (stranger) throw wrong(`${JSON.stringify(stranger[0])} at ${stranger.index} is no base64`);
	const padding = base64.length - bare.length;
	if (bare.length % 4 === 1 || (padding > 0 && base64.length % 4 !== 0)) {
		throw wrong(`base64 of ${base64.length} characters, which is no whole number of bytes`);
	}
	return Buffer.from(bare, "base64");
}

const PERCENT = 0x25;

function percentDecoded(text: string): Buffer {
	const bytes = Buffer.from(text, "utf8");
	if (!bytes.includes(PERCENT)) return bytes;
	const decoded = Buffer.alloc(bytes.length);
	let length = 0;
	for (let at = 0; at < bytes.length; at++) {
		let byte = bytes[at] as number;
		if (byte === PERCENT) {
			const hex = bytes.toString("latin1", at + 1, at + 3);
			if (!/^[0-9a-f]{2}$/i.test(hex)) throw wrong(`"%${hex}" at ${at} is no percent-encoding`);
			byte = Number.parseInt(hex, 16);
			at += 2;
		}
		decoded[length++] = byte;
	}
	return decoded.subarray(0, length);
}

/** An image as a `data:` URL in base64. */
export function toDataUrl(image: { bytes: Uint8Array; content_type: string }): string {
	const { bytes, content_type } = image;
	const base64 = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("base64");
	return `data:${content_type};base64,${base64}`;
}
