/**
 * Rows whose number must be known before the first step, though it is not: written once, in their order, into a spool file
 * without a name; from then on they are a file's rows.
 */
import { createHash } from "node:crypto";
import { type FileHandle, open, rm, statfs } from "node:fs/promises";
import { ArlError, toArlError } from "../../errors.js";
import { Cancellation } from "../cancellation.js";
import type { MadeRow } from "./convert.js";
import { FileRows, indexFromRanges, type RowIndex } from "./jsonl.js";
import type { Scratch } from "./scratch.js";
import type { AnySource, LazyRows, RowContent, Source, UnreadableRow } from "./source.js";

const FLUSH_BYTES = 4 * 1024 * 1024;
/** Part of the free disk that a spool file may take. */
const DISK_PART = 0.8;
const NEWLINE = Buffer.from("\n");
const NO_ROW = Buffer.from("null");

export interface SpoolOptions {
	name: string;
	signal: AbortSignal | null;
	leftOut: () => number;
	/** No row beyond this many is read. */
	most: number;
	/** Called now and then with the rows that were read. */
	progress: (rows: number) => void;
	scratch: Scratch;
	/** Most bytes that are written; absent: most of the free disk. */
	maxBytes?: number;
}

/** Rows that lie in a spool file, and those that could not be had. */
class MaterializedRows implements Source<RowContent>, LazyRows {
	readonly name: string;
	readonly length: number;
	readonly blankLines = 0;
	readonly identity: string;
	readonly lazy: LazyRows = this;
	readonly inOrder = false;
	readonly recheck = false;
	readonly ahead = Number.POSITIVE_INFINITY;

	constructor(
		private readonly file: FileRows,
		private readonly failures: ReadonlyMap<number, UnreadableRow>,
		private readonly locations: ReadonlyMap<number, string>,
		readonly leftOut: number,
	) {
		this.name = file.name;
		this.length = file.length;
		this.identity = file.identity;
	}

	location(index: number): string {
		return this.locations.get(index) ?? `${this.name}[${index}]`;
	}

	bytes(index: number): number {
		return this.file.bytes(index);
	}

	async read(indexes: ArrayLike<number>): Promise<RowContent[]> {
		const rows = await this.file.read(indexes);
		return rows.map((row, i) => this.failures.get(indexes[i] as number) ?? row);
	}

	async take(indexes: Uint32Array, maxBytes: number): Promise<RowContent[]> {
		let count = 0;
		for (let bytes = 0; count < indexes.length; count++) {
			bytes += this.bytes(indexes[count] as number);
			if (count > 0 && bytes > maxBytes) break;
		}
		return this.read(indexes.subarray(0, count));
	}

	peek(indexes: Uint32Array): Promise<RowContent[]> {
		return this.read(indexes);
	}

	sync(): void {}

	cancel(): void {}

	close(): Promise<void> {
		return this.file.close();
	}
}

async function freeBytes(folder: string): Promise<number> {
	const { bavail, bsize } = await statfs(folder);
	return bavail * bsize;
}

/** Reads all rows. Throws `ARL_DATA` where there is none, and where they do not end before the disk is full. */
export async function materializeRows(rows: AsyncIterable<MadeRow>, options: SpoolOptions): Promise<AnySource> {
	const { name, signal } = options;
	const path = options.scratch.newFile();
	const file = await open(path, "wx+").catch((error: unknown) => {
		throw toArlError(error);
	});
	// The open handle keeps the content.
	await rm(path);
	try {
		const maxBytes = options.maxBytes ?? DISK_PART * (await freeBytes(options.scratch.path()));
		const failures = new Map<number, UnreadableRow>();
		const locations = new Map<number, string>();
		const { most, progress } = options;
		const written = { name, maxBytes, most, progress, failures, locations };
		const index = await writeRows(file, untilAborted(rows, signal), written);
		if (index.starts.length === 0) {
			const left = options.leftOut();
			const why = left > 0 ? `: the converting function has left out all ${left}` : "";
			throw new ArlError("ARL_DATA", `${name}: the data set has no rows${why}`);
		}
		const lines = new FileRows(name, file, index, (row) => `${name}[${row}]`);
		return new MaterializedRows(lines, failures, locations, options.leftOut());
	} catch (error) {
		await file.close();
		throw toArlError(error);
	}
}

interface Written {
	name: string;
	maxBytes: number;
	most: number;
	progress: (rows: number) => void;
	failures: Map<number, UnreadableRow>;
	/** Places that do not follow from the row's number. */
	locations: Map<number, string>;
}

/** Writes a line a row; gives where each lies. */
async function writeRows(file: FileHandle, rows: AsyncIterable<MadeRow>, written: Written): Promise<RowIndex> {
	const { name, maxBytes, most, progress, failures, locations } = written;
	const hash = createHash("sha256");
	const ranges: number[] = [];
	let pending: Uint8Array[] = [];
	let bytes = 0;
	let total = 0;
	const flush = async () => {
		const chunk = Buffer.concat(pending);
		hash.update(chunk);
		await file.appendFile(chunk);
		pending = [];
		bytes = 0;
	};
	for await (const { row, location } of rows) {
		const count = ranges.length / 2;
		if (!(row instanceof Uint8Array)) failures.set(count, row);
		const line = row instanceof Uint8Array ? row : NO_ROW;
		if (location !== `${name}[${count}]`) locations.set(count, location);
		ranges.push(total, total + line.length);
		pending.push(line, NEWLINE);
		bytes += line.length + 1;
		total += line.length + 1;
		if (total > maxBytes) throw endless(name, count + 1, total);
		progress(count + 1);
		if (count + 1 >= most) break;
		if (bytes >= FLUSH_BYTES) await flush();
	}
	await flush();
	return indexFromRanges(Float64Array.from(ranges), hash.digest("hex"));
}

function endless(name: string, rows: number, bytes: number): ArlError {
	const size = bytes >= 1024 ** 3 ? `${(bytes / 1024 ** 3).toFixed(1)} GiB` : `${Math.ceil(bytes / 1024)} KiB`;
	return new ArlError(
		"ARL_DATA",
		`${name}: no end after ${rows} rows (${size}), and the disk has no room for more`,
		"A shuffled run has to know all rows. Rows without an end need max_steps and train_sampling_strategy sequential.",
	);
}

/** The rows, until the signal comes: also where the next one never does. */
async function* untilAborted(rows: AsyncIterable<MadeRow>, signal: AbortSignal | null): AsyncGenerator<MadeRow> {
	const iterator = rows[Symbol.asyncIterator]();
	const cancellation = new Cancellation();
	const cancel = () => cancellation.cancel();
	if (signal?.aborted) cancel();
	signal?.addEventListener("abort", cancel);
	let done = false;
	try {
		while (!done) {
			const next = await cancellation.race(iterator.next());
			done = next.done === true;
			if (!next.done) yield next.value;
		}
	} finally {
		signal?.removeEventListener("abort", cancel);
		// Not awaited: a stream that hangs would not let the run end.
		if (!done) Promise.resolve(iterator.return?.()).catch(() => {});
	}
}
