/**
 * A column chunk of a Parquet file page by page: at most one page and the dictionary are held, so that a row group of any
 * size takes no more memory than a small one. Reads as it goes, blocking, as the rows are put together in one loop.
 */
import { readSync } from "node:fs";
import { crc32 } from "node:zlib";
import type { ColumnMetaData, DecodedArray, Encoding, PageHeader, SchemaElement } from "hyparquet";
import { parquetHeader } from "hyparquet/src/column.js";
import { deltaBinaryUnpack, deltaByteArray, deltaLengthByteArray } from "hyparquet/src/delta.js";
import { byteStreamSplit } from "hyparquet/src/encoding.js";
import { readPlain } from "hyparquet/src/plain.js";
import type { Unpack } from "./codecs.js";
import { bitWidth, readHybrid } from "./hybrid.js";

/** Levels and values of one page. Where a level's array is null, all are at their maximum. */
export interface Page {
	count: number;
	repetition: Int32Array | null;
	definition: Int32Array | null;
	/** The values that are there, one after the other. */
	values: Values;
}

/** Values of a page in their order. */
export interface Values {
	/** The next one. Throws where the page ends before it. */
	next(): unknown;
}

/** Values that are there as an array. */
class ArrayValues implements Values {
	private at = 0;
	constructor(private readonly values: DecodedArray) {}

	next(): unknown {
		return this.values[this.at++];
	}
}

/** Values that are places in the dictionary. */
class DictionaryValues implements Values {
	private at = 0;
	constructor(
		private readonly indexes: Int32Array,
		private readonly entries: DecodedArray,
	) {}

	next(): unknown {
		return this.entries[this.indexes[this.at++] as number];
	}
}

/** Plain texts, found as they are asked for: a page of a hundred megabytes has a million of them. */
class PlainTexts implements Values {
	private readonly view: DataView;
	constructor(
		private readonly page: Uint8Array,
		private at: number,
	) {
		this.view = viewOf(page);
	}

	next(): Uint8Array {
		const from = this.at + 4;
		const length = this.view.getUint32(this.at, true);
		this.at = from + length;
		if (this.at > this.page.length) throw new Error("a value ends behind its page");
		return new Uint8Array(this.page.buffer, this.page.byteOffset + from, length);
	}
}

/** What is read of a column. */
export interface ColumnShape {
	element: SchemaElement;
	maxRepetition: number;
	maxDefinition: number;
}

const HEADER_BYTES = 8 * 1024;
const MAX_HEADER_BYTES = 64 * 1024 * 1024;

/** A range of an open file, read in windows. */
class FileRange {
	private window: Uint8Array = new Uint8Array(0);
	private windowStart = 0;

	constructor(
		private readonly fd: number,
		public at: number,
		readonly end: number,
		private readonly readAhead: number,
	) {}

	get left(): number {
		return this.end - this.at;
	}

	/** The next bytes, `length` of them or those that are left. */
	peek(length: number): Uint8Array {
		const wanted = Math.min(length, this.left);
		const from = this.at - this.windowStart;
		if (from < 0 || from + wanted > this.window.length) this.refill(wanted);
		const start = this.at - this.windowStart;
		return this.window.subarray(start, start + wanted);
	}

	private refill(wanted: number): void {
		// A new buffer each time: values of pages that are not compressed lie in the old one.
		const bytes = new Uint8Array(Math.min(Math.max(wanted, this.readAhead), this.left));
		let done = 0;
		while (done < bytes.length) {
			const read = readSync(this.fd, bytes, done, bytes.length - done, this.at + done);
			if (read === 0) throw new Error("the file ends before its column does");
			done += read;
		}
		this.window = bytes;
		this.windowStart = this.at;
	}
}

/** The pages of one column chunk, one after the other. */
export class PageReader {
	private readonly range: FileRange;
	private dictionary: DecodedArray | null = null;
	/** Values, nulls among them, that pages still to come hold. */
	left: number;

	constructor(
		fd: number,
		private readonly shape: ColumnShape,
		private readonly chunk: ColumnMetaData,
		private readonly unpack: Unpack,
		readAhead: number,
	) {
		const data = Number(chunk.data_page_offset);
		const dictionary = Number(chunk.dictionary_page_offset ?? 0n);
		// Some writers leave the dictionary's place at 0.
		const start = dictionary > 0 && dictionary < data ? dictionary : data;
		this.range = new FileRange(fd, start, start + Number(chunk.total_compressed_size), readAhead);
		this.left = Number(chunk.num_values);
	}

	/** Where the next page begins. */
	get offset(): number {
		return this.range.at;
	}

	/** The next page with values; null: there is none. */
	next(): Page | null {
		while (this.left > 0) {
			if (this.range.left <= 0) throw new Error(`${this.left} values are missing`);
			const header = this.header();
			const packed = this.range.peek(header.compressed_page_size);
			if (header.compressed_page_size < 0 || packed.length < header.compressed_page_size) {
				throw new Error("a page ends behind its column");
			}
			if (header.crc !== undefined && crc32(packed) >>> 0 !== header.crc >>> 0) {
				throw new Error("a page's checksum is not that of its bytes");
			}
			this.range.at += header.compressed_page_size;
			if (header.type === "DICTIONARY_PAGE") this.readDictionary(header, packed);
			else if (header.type === "DATA_PAGE" || header.type === "DATA_PAGE_V2") {
				const page = header.type === "DATA_PAGE" ? this.dataPage(header, packed) : this.dataPageV2(header, packed);
				this.left -= page.count;
				if (this.left < 0) throw new Error("pages hold more values than the column");
				if (page.count > 0) return page;
			}
		}
		return null;
	}

	private header(): PageHeader {
		for (let size = HEADER_BYTES; ; size *= 4) {
			const bytes = this.range.peek(size);
			const reader = { view: viewOf(bytes), offset: 0 };
			try {
				const header = parquetHeader(reader);
				this.range.at += reader.offset;
				return header;
			} catch (error) {
				// Statistics in a header may be long; one that is damaged ends at the bound.
				if (size >= this.range.left || size >= MAX_HEADER_BYTES) throw error;
			}
		}
	}

	private readDictionary(header: PageHeader, packed: Uint8Array): void {
		const count = header.dictionary_page_header?.num_values ?? 0;
		const page = this.unpack(packed, header.uncompressed_page_size);
		this.dictionary = this.plain(page, 0, count);
	}

	private dataPage(header: PageHeader, packed: Uint8Array): Page {
		const head = header.data_page_header;
		if (!head) throw new Error("a page without its header");
		const page = this.unpack(packed, header.uncompressed_page_size);
		const count = this.checkCount(head.num_values);
		const view = viewOf(page);
		let at = 0;
		const levels = (max: number, encoding: Encoding): Int32Array | null => {
			if (max === 0) return null;
			if (encoding !== "RLE") throw new Error(`levels in the encoding ${encoding}, which is not read`);
			const end = at + 4 + view.getUint32(at, true);
			if (end > page.length) throw new Error("levels end behind their page");
			const read = readHybrid(page, at + 4, end, bitWidth(max), count);
			at = end;
			return read;
		};
		const repetition = levels(this.shape.maxRepetition, head.repetition_level_encoding);
		const definition = levels(this.shape.maxDefinition, head.definition_level_encoding);
		return this.page(count, repetition, definition, page, at, head.encoding);
	}

	private dataPageV2(header: PageHeader, packed: Uint8Array): Page {
		const head = header.data_page_header_v2;
		if (!head) throw new Error("a page without its header");
		const count = this.checkCount(head.num_values);
		const { maxRepetition, maxDefinition } = this.shape;
		const repetitionEnd = head.repetition_levels_byte_length;
		const levelsEnd = repetitionEnd + head.definition_levels_byte_length;
		if (repetitionEnd < 0 || levelsEnd < repetitionEnd || levelsEnd > packed.length) {
			throw new Error("levels end behind their page");
		}
		const repetition =
			maxRepetition === 0 ? null : readHybrid(packed, 0, repetitionEnd, bitWidth(maxRepetition), count);
		const definition =
			maxDefinition === 0 ? null : readHybrid(packed, repetitionEnd, levelsEnd, bitWidth(maxDefinition), count);
		const rest = packed.subarray(levelsEnd);
		const size = header.uncompressed_page_size - levelsEnd;
		const page = head.is_compressed === false ? rest : this.unpack(rest, size);
		return this.page(count, repetition, definition, page, 0, head.encoding);
	}

	private checkCount(count: number): number {
		if (count < 0 || count > this.left) throw new Error(`a page of ${count} values where ${this.left} are left`);
		return count;
	}

	private page(
		count: number,
		repetition: Int32Array | null,
		definition: Int32Array | null,
		bytes: Uint8Array,
		at: number,
		encoding: Encoding,
	): Page {
		let present = count;
		if (definition !== null) {
			present = 0;
			for (const level of definition) if (level === this.shape.maxDefinition) present += 1;
		}
		const values = present === 0 ? new ArrayValues([]) : this.values(bytes, at, present, encoding);
		return { count, repetition, definition, values };
	}

	private values(bytes: Uint8Array, at: number, count: number, encoding: Encoding): Values {
		if (encoding === "PLAIN_DICTIONARY" || encoding === "RLE_DICTIONARY") {
			const entries = this.dictionary ?? [];
			const indexes = readHybrid(bytes, at + 1, bytes.length, bytes[at] ?? 0, count);
			for (const index of indexes) if (index >= entries.length) throw new Error("an index behind the dictionary's end");
			return new DictionaryValues(indexes, entries);
		}
		if (encoding === "PLAIN" && this.shape.element.type === "BYTE_ARRAY") return new PlainTexts(bytes, at);
		return new ArrayValues(this.decoded(bytes, at, count, encoding));
	}

	private decoded(bytes: Uint8Array, at: number, count: number, encoding: Encoding): DecodedArray {
		const { type, type_length } = this.shape.element;
		const reader = { view: viewOf(bytes), offset: at };
		const whole = <T>(values: T): T => {
			if (reader.offset > bytes.length) throw new Error("values end behind their page");
			return values;
		};
		switch (encoding) {
			case "PLAIN":
				return this.plain(bytes, at, count);
			case "RLE": {
				if (type !== "BOOLEAN") break;
				const end = at + 4 + reader.view.getUint32(at, true);
				return readHybrid(bytes, at + 4, Math.min(end, bytes.length), 1, count);
			}
			case "DELTA_BINARY_PACKED": {
				// Always in 64 bits: some writers (DuckDB) give the first unsigned value of 32 bits as one of 33.
				const values = new BigInt64Array(count);
				deltaBinaryUnpack(reader, count, values);
				return whole(type === "INT32" ? Int32Array.from(values, (value) => Number(BigInt.asIntN(32, value))) : values);
			}
			case "DELTA_LENGTH_BYTE_ARRAY": {
				const values = new Array<Uint8Array>(count);
				deltaLengthByteArray(reader, count, values);
				return whole(values);
			}
			case "DELTA_BYTE_ARRAY": {
				const values = new Array<Uint8Array>(count);
				deltaByteArray(reader, count, values);
				return whole(values);
			}
			case "BYTE_STREAM_SPLIT":
				if (type) return whole(byteStreamSplit(reader, count, type, type_length));
		}
		throw new Error(`values in the encoding ${encoding}, which is not read`);
	}

	private plain(bytes: Uint8Array, at: number, count: number): DecodedArray {
		const { type, type_length } = this.shape.element;
		// A byte holds eight booleans at most; any other value takes a byte at least.
		if (!type || count < 0 || count > (bytes.length - at) * 8)
			throw new Error("a page holds fewer values than it says");
		const reader = { view: viewOf(bytes), offset: at };
		const values = readPlain(reader, type, count, type_length);
		if (reader.offset > bytes.length) throw new Error("values end behind their page");
		return values;
	}

	/** The codec, for messages. */
	get codec(): string {
		return this.chunk.codec;
	}
}

function viewOf(bytes: Uint8Array): DataView {
	return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
