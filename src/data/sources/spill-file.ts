/**
 * Rows that are put together while a file is read, written once into a file that has no name any more by the time it is
 * read: the open handle keeps the content, and a killed process leaves nothing behind.
 */
import { createHash } from "node:crypto";
import { open, rm } from "node:fs/promises";
import { dirname } from "node:path";
import { ArlError, toArlError } from "../../errors.js";
import { JsonBytes } from "./json-bytes.js";
import { FileRows, Offsets } from "./jsonl.js";
import type { Scratch } from "./scratch.js";

const FLUSH_BYTES = 4 * 1024 * 1024;
const NEWLINE = 10;

/** What a spool file is for. */
export interface SpoolOptions {
	scratch: Scratch;
	/** The source's name. */
	name: string;
	/** Whether `endRow` is given the line that a row came from. */
	numbered: boolean;
	/** Where row `row` came from, `line` being what `endRow` was given. */
	locate: (row: number, line: number) => string;
	/** Ends the writing. */
	signal: AbortSignal | null;
}

/** The error of a spool file that cannot be written. */
function spoolError(error: unknown, { name, scratch }: SpoolOptions): ArlError {
	const known = toArlError(error);
	if (!(error instanceof Error) || Reflect.get(error, "code") !== "ENOSPC") return known;
	return new ArlError(
		known.code,
		`${name}: no space is left in ${dirname(scratch.path())} for the rows as text`,
		"Free some space, or give a folder with more as cache_dir.",
		{ cause: error },
	);
}

/** Where rows are written to, one after the other. */
export class SpillFile {
	/** The row in progress. */
	readonly out = new JsonBytes();
	private readonly starts = new Offsets();
	private readonly ends = new Offsets();
	private readonly lines: Offsets | null;
	private readonly hash = createHash("sha256");
	private rowStart = 0;
	private written = 0;

	private constructor(
		private readonly handle: Awaited<ReturnType<typeof open>>,
		private readonly options: SpoolOptions,
	) {
		this.lines = options.numbered ? new Offsets() : null;
	}

	/** Has `fill` write rows, and gives them as a source. */
	static async fill(
		options: SpoolOptions,
		fill: (spool: SpillFile) => Promise<{ blankLines: number }>,
	): Promise<FileRows> {
		const path = options.scratch.newFile();
		const handle = await open(path, "wx+").catch((error: unknown) => {
			throw toArlError(error);
		});
		// The open handle keeps the content.
		await rm(path);
		try {
			const spool = new SpillFile(handle, options);
			const { blankLines } = await fill(spool);
			await spool.flush();
			const { starts, ends, lines } = spool;
			const index = { starts, ends, lines, blankLines, identity: spool.hash.digest("hex") };
			return new FileRows(options.name, handle, index, (row) => options.locate(row, lines ? lines.at(row) : row + 1));
		} catch (error) {
			await handle.close();
			throw error;
		}
	}

	get rows(): number {
		return this.starts.length;
	}

	/** Ends the row in progress, which came from `line`. True: it is time to `flush`. */
	endRow(line = 0): boolean {
		this.starts.push(this.written + this.rowStart);
		this.ends.push(this.written + this.out.length);
		this.lines?.push(line);
		// The line's end is no part of the row; with it the content is that of the same rows as JSONL.
		this.out.byte(NEWLINE);
		this.rowStart = this.out.length;
		return this.out.length >= FLUSH_BYTES;
	}

	/** Writes the rows that are finished to the file. */
	async flush(): Promise<void> {
		if (this.options.signal?.aborted) {
			throw new ArlError("ARL_INTERRUPTED", `interrupted while ${this.options.name} was read; nothing was trained`);
		}
		const bytes = this.out.written();
		this.hash.update(bytes);
		for (let done = 0; done < bytes.length; ) {
			const { bytesWritten } = await this.handle
				.write(bytes, done, bytes.length - done, this.written + done)
				.catch((error: unknown) => {
					throw spoolError(error, this.options);
				});
			done += bytesWritten;
		}
		this.written += bytes.length;
		this.out.clear();
		this.rowStart = 0;
	}
}
