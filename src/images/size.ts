/** Width and height of an image from its header, as it is displayed: a photograph's rotation counts. Decodes no pixels. */
import type { ImageType } from "../data/mime.js";

/** Pixels. */
export interface ImageSize {
	width: number;
	height: number;
}

/** The size of an image; null: its header is damaged or truncated. */
export function imageSize(bytes: Uint8Array, type: ImageType): ImageSize | null {
	const all = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
	try {
		const size = READERS[type](all);
		return size && size.width > 0 && size.height > 0 ? size : null;
	} catch (error) {
		// The header points beyond the end of the bytes.
		if (error instanceof RangeError) return null;
		throw error;
	}
}

const READERS: Readonly<Record<ImageType, (all: Buffer) => ImageSize | null>> = {
	"image/png": (all) => ({ width: all.readUInt32BE(16), height: all.readUInt32BE(20) }),
	"image/gif": (all) => ({ width: all.readUInt16LE(6), height: all.readUInt16LE(8) }),
	"image/bmp": (all) =>
		all.readUInt32LE(14) < 40
			? { width: all.readUInt16LE(18), height: all.readUInt16LE(20) }
			: // A negative height means that rows are stored from top to bottom.
				{ width: all.readInt32LE(18), height: Math.abs(all.readInt32LE(22)) },
	"image/webp": webp,
	"image/jpeg": jpeg,
	"image/tiff": (all) => tiff(all),
	"image/avif": avif,
};

function webp(all: Buffer): ImageSize | null {
	switch (all.toString("latin1", 12, 16)) {
		case "VP8 ":
			return { width: all.readUInt16LE(26) & 0x3fff, height: all.readUInt16LE(28) & 0x3fff };
		case "VP8L": {
			const bits = all.readUInt32LE(21);
			return { width: (bits & 0x3fff) + 1, height: ((bits >>> 14) & 0x3fff) + 1 };
		}
		case "VP8X":
			return { width: all.readUIntLE(24, 3) + 1, height: all.readUIntLE(27, 3) + 1 };
		default:
			return null;
	}
}

/** Markers of a JPEG frame; C4, C8 and CC are tables. */
const isFrame = (marker: number) => marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);

function jpeg(all: Buffer): ImageSize | null {
	let turned = false;
	for (let at = 2; at + 4 <= all.length; ) {
		if (all[at] !== 0xff) return null;
		const marker = all[at + 1] as number;
		// 0xff may be repeated as padding.
		if (marker === 0xff) {
			at += 1;
			continue;
		}
		const length = all.readUInt16BE(at + 2);
		if (isFrame(marker)) {
			const size = { height: all.readUInt16BE(at + 5), width: all.readUInt16BE(at + 7) };
			return turned ? { width: size.height, height: size.width } : size;
		}
		if (marker === 0xe1 && all.toString("latin1", at + 4, at + 10) === "Exif\0\0") {
			turned = isTurned(all.subarray(at + 10, at + 2 + length));
		}
		at += 2 + length;
	}
	return null;
}

/** Orientations 5 to 8 swap width and height. */
const isRotated = (orientation: number | undefined) =>
	orientation !== undefined && orientation >= 5 && orientation <= 8;

function isTurned(exif: Buffer): boolean {
	try {
		return isRotated(tags(exif, [0x112]).get(0x112));
	} catch (error) {
		// Damaged EXIF is no reason to refuse an image: viewers ignore it.
		if (error instanceof RangeError) return false;
		throw error;
	}
}

function tiff(all: Buffer): ImageSize | null {
	const found = tags(all, [256, 257, 0x112]);
	const [width, height] = [found.get(256), found.get(257)];
	if (width === undefined || height === undefined) return null;
	return isRotated(found.get(0x112)) ? { width: height, height: width } : { width, height };
}

/** Values of integer tags in the first directory of a TIFF structure; EXIF is one too. */
function tags(all: Buffer, wanted: readonly number[]): Map<number, number> {
	const little = all.toString("latin1", 0, 2) === "II";
	const u16 = (at: number) => (little ? all.readUInt16LE(at) : all.readUInt16BE(at));
	const u32 = (at: number) => (little ? all.readUInt32LE(at) : all.readUInt32BE(at));
	const u64 = (at: number) => Number(little ? all.readBigUInt64LE(at) : all.readBigUInt64BE(at));
	const big = u16(2) === 43;
	const directory = big ? u64(8) : u32(4);
	const count = big ? u64(directory) : u16(directory);
	const first = directory + (big ? 8 : 2);
	const entry = big ? 20 : 12;
	const found = new Map<number, number>();
	for (let i = 0; i < count && found.size < wanted.length; i++) {
		const at = first + i * entry;
		const tag = u16(at);
		if (!wanted.includes(tag)) continue;
		const value = at + (big ? 12 : 8);
		const type = u16(at + 2);
		found.set(tag, type === 3 ? u16(value) : type === 16 ? u64(value) : u32(value));
	}
	return found;
}

/** The largest of the extents in the file: the tiles of a grid and an alpha plane have extents too. */
function avif(all: Buffer): ImageSize | null {
	const end = Math.min(all.length, 64 * 1024);
	let largest: ImageSize | null = null;
	for (let at = all.indexOf("ispe", 0, "latin1"); at >= 0 && at < end; at = all.indexOf("ispe", at + 4, "latin1")) {
		const size = { width: all.readUInt32BE(at + 8), height: all.readUInt32BE(at + 12) };
		if (largest === null || size.width * size.height > largest.width * largest.height) largest = size;
	}
	return largest;
}
