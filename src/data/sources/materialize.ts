/**
 * Reads a data set of unknown length to its end, for runs that must know the number of rows before the first step: the rows are
 * written once, in order, into a spill file, and read from it afterwards.
 */
import { statfs } from "node:fs/promises";
import { ArlError } from "../../errors.js";
import { Cancellation } from "../cancellation.js";
import type { MadeRow } from "./convert.js";
import type { FileRows } from "./jsonl.js";
import type { Scratch } from "./scratch.js";
import type { AnySource, RowContent, Source, UnreadableRow } from "./source.js";
import { SpillFile } from "./spill-file.js";

/** The share of the free disk space that a spill file may use. */
const DISK_SHARE = 0.8;
/** What the spill file holds for a row that could not be read. */
const NO_ROW = Buffer.from("null");

export interface MaterializeOptions {
	name: string;
	signal: AbortSignal | null;
	/** Rows that the converting function has left out so far. */
	leftOut: () => number;
	/** Reading stops after this many rows. */
	most: number;
	/** Called after each row with the number of rows read. */
	progress: (rows: number) => void;
	scratch: Scratch;
	/** Limit on the spill file's size; absent: most of the free disk space. */
	maxBytes?: number;
}

/** The rows of a spill file, and the reasons for those that could not be read. */
class MaterializedRows implements Source<RowContent> {
	readonly name: string;
	readonly length: number;
	readonly blankLines = 0;
	readonly identity: string;

	constructor(
		private readonly file: FileRows,
		private readonly failures: ReadonlyMap<number, UnreadableRow>,
		readonly leftOut: number,
	) {
		this.name = file.name;
		this.length = file.length;
		this.identity = file.identity;
	}

	location(index: number): string {
		return this.file.location(index);
	}

	bytes(index: number): number {
		return this.file.bytes(index);
	}

	async read(indexes: ArrayLike<number>): Promise<RowContent[]> {
		const rows = await this.file.read(indexes);
		return rows.map((row, i) => this.failures.get(indexes[i] as number) ?? row);
	}

	close(): Promise<void> {
		return this.file.close();
	}
}

async function freeBytes(folder: string): Promise<number> {
	const { bavail, bsize } = await statfs(folder);
	return bavail * bsize;
}

/** Reads all rows. Throws `ARL_DATA` if there are none, or if the disk is full before they end. */
export async function materializeRows(rows: AsyncIterable<MadeRow>, options: MaterializeOptions): Promise<AnySource> {
	const { name, scratch, signal, leftOut, most, progress } = options;
	const failures = new Map<number, UnreadableRow>();
	/** Only those that do not follow from the row's number. */
	const locations = new Map<number, string>();
	const locate = (row: number) => locations.get(row) ?? `${name}[${row}]`;
	const file = await SpillFile.fill({ scratch, name, numbered: false, locate, signal: null }, async (spill) => {
		const maxBytes = options.maxBytes ?? DISK_SHARE * (await freeBytes(scratch.path()));
		for await (const { row, location } of untilAborted(rows, signal)) {
			const index = spill.rows;
			if (!(row instanceof Uint8Array)) failures.set(index, row);
			if (location !== locate(index)) locations.set(index, location);
			spill.out.raw(row instanceof Uint8Array ? row : NO_ROW);
			const isFull = spill.endRow();
			if (spill.bytes > maxBytes) throw endless(name, spill.rows, spill.bytes);
			progress(spill.rows);
			if (spill.rows >= most) break;
			if (isFull) await spill.flush();
		}
		if (spill.rows > 0) return { blankLines: 0 };
		const why = leftOut() > 0 ? `: the converting function has left out all ${leftOut()}` : "";
		throw new ArlError("ARL_DATA", `${name}: the data set has no rows${why}`);
	});
	return new MaterializedRows(file, failures, leftOut());
}

function endless(name: string, rows: number, bytes: number): ArlError {
	const size = bytes >= 1024 ** 3 ? `${(bytes / 1024 ** 3).toFixed(1)} GiB` : `${Math.ceil(bytes / 1024)} KiB`;
	return new ArlError(
		"ARL_DATA",
		`${name}: no end after ${rows} rows (${size}), and the disk has no room for more`,
		"A shuffled run must know all rows. Rows without an end need max_steps and train_sampling_strategy sequential.",
	);
}

/** The rows until the signal is aborted, even if the next one never comes. */
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
		// Not awaited: a stream that hangs must not keep the run from ending.
		if (!done) Promise.resolve(iterator.return?.()).catch(() => {});
	}
}
