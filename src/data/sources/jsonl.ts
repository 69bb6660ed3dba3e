/**
 * Reads a JSONL file: one pass finds the byte range of each line and hashes the content, then lines are read at random.
 * A file stays open while it is in use, so that renaming or unlinking it has no effect.
 */
import { createHash } from "node:crypto";
import { type FileHandle, open } from "node:fs/promises";
import { ArlError, toArlError } from "../../errors.js";
import { BOM } from "./sniff.js";
import type { Source } from "./source.js";

const READ_BYTES = 4 * 1024 * 1024;
/** Neighbouring rows are read together when the gap between them is smaller than this. */
const GAP_BYTES = 64 * 1024;
const MAX_TOGETHER_BYTES = 8 * 1024 * 1024;

/** A growing array of offsets: those beyond 2^32 are exact in a double up to 2^53. */
export class Offsets {
	private values = new Float64Array(1024);
	length = 0;

	push(value: number): void {
		if (this.length === this.values.length) {
			const grown = new Float64Array(this.values.length * 2);
			grown.set(this.values);
			this.values = grown;
		}
		this.values[this.length++] = value;
	}

	at(index: number): number {
		return this.values[index] as number;
	}
}

/** Where the rows are in their file: bytes [start, end), and the line (null: the row's number plus one). */
export interface RowIndex {
	starts: Offsets;
	ends: Offsets;
	lines: Offsets | null;
	blankLines: number;
	identity: string;
}

function isBlank(bytes: Uint8Array): boolean {
	for (const byte of bytes) if (byte !== 0x20 && byte !== 0x09 && byte !== 0x0d) return false;
	return true;
}

/** Finds the lines of a file and hashes it. A `\r` before a newline and a byte order mark at the start are not part of a row. */
async function indexLines(handle: FileHandle): Promise<RowIndex> {
	const starts = new Offsets();
	const ends = new Offsets();
	let lines: Offsets | null = null;
	let blankLines = 0;
	let line = 0;
	let start = 0;
	/** Whether earlier chunks contain anything but white space of the line in progress. */
	let seen = false;
	let lastByte = 0;
	const hash = createHash("sha256");
	const buffer = Buffer.allocUnsafe(READ_BYTES);

	const finish = (end: number, blank: boolean) => {
		line += 1;
		if (blank) {
			blankLines += 1;
			if (lines === null) {
				lines = new Offsets();
				for (let i = 1; i <= starts.length; i++) lines.push(i);
			}
			return;
		}
		starts.push(start);
		ends.push(end);
		lines?.push(line);
	};

	let offset = 0;
	for (;;) {
		const { bytesRead } = await handle.read(buffer, 0, READ_BYTES, offset);
		if (bytesRead === 0) break;
		const chunk = buffer.subarray(0, bytesRead);
		hash.update(chunk);
		let from = 0;
		if (offset === 0 && chunk.subarray(0, 3).equals(BOM)) {
			from = 3;
			start = 3;
		}
		for (;;) {
			const at = chunk.indexOf(10, from);
			if (at < 0) break;
			const before = at > 0 ? chunk[at - 1] : lastByte;
			const end = offset + at;
			// If the line began in an earlier chunk, only the rest of it is left to check.
			const blank = !seen && isBlank(chunk.subarray(from, at));
			finish(before === 13 && end > start ? end - 1 : end, blank);
			from = at + 1;
			start = end + 1;
			seen = false;
		}
		if (from < bytesRead) seen ||= !isBlank(chunk.subarray(from, bytesRead));
		lastByte = chunk[bytesRead - 1] as number;
		offset += bytesRead;
	}
	if (offset > start) {
		if (seen) finish(lastByte === 13 ? offset - 1 : offset, false);
		else finish(offset, true);
	}
	return { starts, ends, lines, blankLines, identity: hash.digest("hex") };
}

/** Rows at known byte ranges of an open file. */
export class FileRows implements Source {
	readonly length: number;
	readonly blankLines: number;
	readonly identity: string;

	constructor(
		readonly name: string,
		private readonly handle: FileHandle,
		private readonly index: RowIndex,
		private readonly locate: (row: number, index: RowIndex) => string,
	) {
		this.length = index.starts.length;
		this.blankLines = index.blankLines;
		this.identity = index.identity;
	}

	location(row: number): string {
		return this.locate(row, this.index);
	}

	bytes(row: number): number {
		return this.index.ends.at(row) - this.index.starts.at(row);
	}

	async read(indexes: ArrayLike<number>): Promise<Uint8Array[]> {
		const { starts, ends } = this.index;
		const places = Array.from({ length: indexes.length }, (_, place) => place).sort(
			(a, b) => starts.at(indexes[a] as number) - starts.at(indexes[b] as number),
		);
		const rows = new Array<Uint8Array>(indexes.length);
		let next = 0;
		while (next < places.length) {
			const first = next;
			const from = starts.at(indexes[places[first] as number] as number);
			let to = ends.at(indexes[places[first] as number] as number);
			for (next += 1; next < places.length; next++) {
				const row = indexes[places[next] as number] as number;
				if (starts.at(row) - to > GAP_BYTES || ends.at(row) - from > MAX_TOGETHER_BYTES) break;
				to = Math.max(to, ends.at(row));
			}
			const bytes = await this.readRange(from, to);
			for (let i = first; i < next; i++) {
				const place = places[i] as number;
				const row = indexes[place] as number;
				rows[place] = bytes.subarray(starts.at(row) - from, ends.at(row) - from);
			}
		}
		return rows;
	}

	private async readRange(from: number, to: number): Promise<Buffer> {
		const bytes = Buffer.allocUnsafe(to - from);
		let done = 0;
		while (done < bytes.length) {
			const { bytesRead } = await this.handle
				.read(bytes, done, bytes.length - done, from + done)
				.catch((error: unknown) => {
					throw toArlError(error);
				});
			if (bytesRead === 0) {
				throw new ArlError(
					"ARL_DATA",
					`${this.name}: the file became shorter while it was being read`,
					"Do not write to a file of rows while a run uses it.",
				);
			}
			done += bytesRead;
		}
		return bytes;
	}

	async close(): Promise<void> {
		await this.handle.close();
	}
}

/** Opens a file. It stays open, so that renaming or unlinking it later has no effect. */
export async function openHandle(path: string): Promise<FileHandle> {
	return open(path, "r").catch((error: unknown) => {
		throw toArlError(error);
	});
}

/** Opens an uncompressed JSONL file; `name`: the path that the user gave, if it differs from `path`. */
export async function openJsonl(path: string, name = path): Promise<FileRows> {
	const handle = await openHandle(path);
	try {
		const index = await indexLines(handle);
		if (index.starts.length === 0) {
			throw new ArlError(
				"ARL_DATA",
				`${name}:1: the file has no rows, only ${index.blankLines} blank lines`,
				"Each line should be a JSON object.",
			);
		}
		return new FileRows(name, handle, index, (row, { lines }) => `${name}:${lines ? lines.at(row) : row + 1}`);
	} catch (error) {
		await handle.close();
		throw error;
	}
}

/** The index of rows at given byte ranges, for example the elements of a JSON array. */
export function indexFromRanges(ranges: Float64Array, identity: string): RowIndex {
	const starts = new Offsets();
	const ends = new Offsets();
	for (let i = 0; i + 1 < ranges.length; i += 2) {
		starts.push(ranges[i] as number);
		ends.push(ranges[i + 1] as number);
	}
	return { starts, ends, lines: null, blankLines: 0, identity };
}
