/**
 * Identifies image bytes by their content: the type, whether they are truncated, and what else they look like. Decodes nothing.
 */

/** The supported types of images. */
export type ImageType =
	| "image/png"
	| "image/jpeg"
	| "image/gif"
	| "image/webp"
	| "image/bmp"
	| "image/tiff"
	| "image/avif";

function view(bytes: Uint8Array): Buffer {
	return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

const BMP_HEADERS: ReadonlySet<number> = new Set([12, 16, 40, 52, 56, 64, 108, 124]);

/** The image type of `bytes`; null: not a supported type. */
export function imageType(bytes: Uint8Array): ImageType | null {
	const head = view(bytes).subarray(0, 64);
	const text = (from: number, to: number) => head.toString("latin1", from, to);
	if (text(0, 8) === "\x89PNG\r\n\x1a\n") return "image/png";
	if (text(0, 3) === "\xff\xd8\xff") return "image/jpeg";
	if (text(0, 6) === "GIF87a" || text(0, 6) === "GIF89a") return "image/gif";
	if (text(0, 4) === "RIFF" && text(8, 12) === "WEBP") return "image/webp";
	if (["II*\0", "MM\0*", "II+\0", "MM\0+"].includes(text(0, 4))) return "image/tiff";
	if (text(0, 2) === "BM" && head.length >= 26 && BMP_HEADERS.has(head.readUInt32LE(14))) return "image/bmp";
	if (brands(head).some((brand) => brand === "avif" || brand === "avis")) return "image/avif";
	return null;
}

/** Brands of an ISO media file: the major brand and the compatible ones. */
function brands(head: Buffer): string[] {
	if (head.length < 16 || head.toString("latin1", 4, 8) !== "ftyp") return [];
	const end = Math.min(head.length, head.readUInt32BE(0));
	const found = [head.toString("latin1", 8, 12)];
	for (let at = 16; at + 4 <= end; at += 4) found.push(head.toString("latin1", at, at + 4));
	return found;
}

/** Describes bytes that are not an image, for an error. */
export function describeBytes(bytes: Uint8Array): string {
	if (bytes.length === 0) return "nothing (0 bytes)";
	const head = view(bytes).subarray(0, 512);
	const found = brands(head);
	if (found.some((brand) => ["heic", "heix", "hevc", "mif1", "heim"].includes(brand))) return "a HEIC image";
	if (found.length > 0) return "a video";
	const text = head.toString("latin1").trimStart().toLowerCase();
	if (text.startsWith("%pdf")) return "a PDF";
	if (text.startsWith("<svg") || (text.startsWith("<?xml") && text.includes("<svg"))) return "an SVG drawing";
	if (text.startsWith("<")) return "a page of HTML or XML";
	if (text.startsWith("{") || text.startsWith("[")) return "JSON";
	if (text.startsWith("pk\x03\x04")) return "a ZIP archive";
	if (text.startsWith("\x1f\x8b")) return "gzip";
	// biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what tells binary data from text
	if (!/[\x00-\x08\x0e-\x1f]/.test(text)) return "text";
	return `bytes that begin with ${head.subarray(0, 8).toString("hex")}`;
}

/**
 * Whether an image is truncated, as after a broken connection, by the length or end marker of its format; formats that have
 * neither count as complete.
 */
export function isTruncated(bytes: Uint8Array, type: ImageType): boolean {
	const all = view(bytes);
	switch (type) {
		case "image/png": {
			for (let at = 8; at + 12 <= all.length; at += 12 + all.readUInt32BE(at)) {
				if (all.toString("latin1", at + 4, at + 8) === "IEND") return false;
			}
			return true;
		}
		// Decoders of JPEG wait for the end marker; bytes after it are common and harmless.
		case "image/jpeg":
			return all.lastIndexOf(Buffer.of(0xff, 0xd9)) < 4;
		case "image/webp":
			return all.length < 12 || all.readUInt32LE(4) + 8 > all.length;
		case "image/gif":
			return all.lastIndexOf(0x3b) < 13;
		default:
			return false;
	}
}
