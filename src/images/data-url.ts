/** Decodes and encodes `data:` URLs. Ignores the media type that a URL claims: the bytes determine an image's type. */
import { ArlError } from "../errors.js";

function malformed(what: string): ArlError {
	return new ArlError(
		"ARL_DATA",
		what,
		"A data URL looks like data:image/png;base64,iVBORw0KGgo..., with the whole image after the comma.",
	);
}

/** The longest `data:` URL that can hold `maxBytes`: percent-encoding writes a byte as three characters. */
export function maxDataUrlLength(maxBytes: number): number {
	return maxBytes * 3 + 1024;
}

/** The bytes of a `data:` URL in base64, percent-encoding or both. Throws `ARL_DATA`. */
export function dataUrlBytes(url: string): Uint8Array {
	const text = url.trim();
	const comma = text.indexOf(",");
	if (comma < 0) throw malformed("a data URL without a comma");
	const isBase64 = /;\s*base64\s*$/i.test(text.slice(0, comma));
	const hash = text.indexOf("#", comma);
	const content = percentDecoded(text.slice(comma + 1, hash < 0 ? undefined : hash));
	if (!isBase64) return content;
	const base64 = content.toString("latin1").replace(/[\t\n\f\r ]+/g, "");
	const bare = base64.replace(/={1,2}$/, "");
	const invalid = /[^A-Za-z0-9+/_-]/.exec(bare);
	if (invalid) throw malformed(`${JSON.stringify(invalid[0])} at ${invalid.index} is not base64`);
	const padding = base64.length - bare.length;
	if (bare.length % 4 === 1 || (padding > 0 && base64.length % 4 !== 0)) {
		throw malformed(`base64 of ${base64.length} characters, which is not a whole number of bytes`);
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
			if (!/^[0-9a-f]{2}$/i.test(hex)) throw malformed(`"%${hex}" at ${at} is not percent-encoding`);
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
