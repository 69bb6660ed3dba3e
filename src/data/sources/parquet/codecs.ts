/**
 * How a page is unpacked, by the codec's name in the file: Node's own zlib where it has the codec, the core for zstd, wasm for
 * snappy.
 */
import { brotliDecompressSync, unzipSync } from "node:zlib";
import type { CompressionCodec } from "hyparquet";
import type { Native } from "../../../native.js";

/** Unpacks to exactly `length` bytes, or throws. */
export type Unpack = (bytes: Uint8Array, length: number) => Uint8Array;

/** What unpacking needs of the core. */
export type UnpackNative = Pick<Native, "unpackZstd">;

/** A page above this size is refused: wasm has four GiB, and a page is held at once. */
const MAX_PAGE_BYTES = 1024 ** 3;

/** The functions for a file's codecs; those that need it are loaded. Throws the name of one that is not known. */
export async function loadCodecs(
	native: UnpackNative,
	codecs: Iterable<CompressionCodec>,
): Promise<Map<CompressionCodec, Unpack>> {
	const loaded = new Map<CompressionCodec, Unpack>();
	for (const codec of new Set(codecs)) {
		const unpack = await load(native, codec);
		loaded.set(codec, (bytes, length) => {
			if (length > MAX_PAGE_BYTES) throw new Error(`a page of ${length} bytes; at most ${MAX_PAGE_BYTES} are read`);
			if (length === 0) return new Uint8Array(0);
			const page = unpack(bytes, length);
			if (page.length !== length) throw new Error(`a page of ${length} bytes unpacks to ${page.length}`);
			return page;
		});
	}
	return loaded;
}

async function load(native: UnpackNative, codec: CompressionCodec): Promise<Unpack> {
	switch (codec) {
		case "UNCOMPRESSED":
			return (bytes) => bytes;
		case "GZIP":
			return (bytes, length) => unzipSync(bytes, { maxOutputLength: length });
		case "BROTLI":
			return (bytes, length) => brotliDecompressSync(bytes, { maxOutputLength: length });
		case "ZSTD":
			return native.unpackZstd;
		case "SNAPPY":
		case "LZ4":
		case "LZ4_RAW": {
			const { compressors } = await import("hyparquet-compressors");
			const unpack = compressors[codec];
			if (unpack) return unpack;
		}
	}
	throw new Error(String(codec));
}
