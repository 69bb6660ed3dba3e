/**
 * Rows generated while a source is read, written once into a file whose name is removed at once: the open handle keeps the
 * content, and a killed process leaves nothing behind.
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

/** How a spill file is written and read. */
export interface SpillOptions {
	scratch: Scratch;
	/** The source's name. */
	name: string;
	/** Whether `endRow` gets the line that a row came from. */
	numbered: boolean;
	/** The location of row `row`; `line`: the argument of its `endRow`. */
	locate: (row: number, line: number) => string;
	/** Aborts the writing. */
	signal: AbortSignal | null;
}

/** The error for a spill file that cannot be written. */
function spillError(error: unknown, { name, scratch }: SpillOptions): ArlError {
	const known = toArlError(error);
	if (!(error instanceof Error) || Reflect.get(error, "code") !== "ENOSPC") return known;
	return new ArlError(
		known.code,
		`${name}: no space is left in ${dirname(scratch.path())} for the rows as text`,
		"Free some space, or give a folder with more as cache_dir.",
		{ cause: error },
	);
}

/** A spill file while it is written, one row after the other. */
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
		private readonly options: SpillOptions,
	) {
		this.lines = options.numbered ? new Offsets() : null;
	}

	/** Creates a spill file, lets `fill` write the rows, and returns them as a source. Throws `ArlError`s only. */
	static async fill(
		options: SpillOptions,
		fill: (spill: SpillFile) => Promise<{ blankLines: number }>,
	): Promise<FileRows> {
		const path = options.scratch.newFile();
		const handle = await open(path, "wx+").catch((error: unknown) => {
			throw toArlError(error);
		});
		// The open handle keeps the content.
		await rm(path);
		try {
			const spill = new SpillFile(handle, options);
			const { blankLines } = await fill(spill);
			await spill.flush();
			const { starts, ends, lines } = spill;
			const index = { starts, ends, lines, blankLines, identity: spill.hash.digest("hex") };
			return new FileRows(options.name, handle, index, (row) => options.locate(row, lines ? lines.at(row) : row + 1));
		} catch (error) {
			await handle.close();
			throw toArlError(error);
		}
	}

	/** Rows that are complete. */
	get rows(): number {
		return this.starts.length;
	}

	/** Size of these rows in the file. */
	get bytes(): number {
		return this.written + this.out.length;
	}

	/** Completes the row in progress, which came from `line`. True: it is time to `flush`. */
	endRow(line = 0): boolean {
		this.starts.push(this.written + this.rowStart);
		this.ends.push(this.written + this.out.length);
		this.lines?.push(line);
		// The newline is not part of the row; with it the file is the same rows as JSONL.
		this.out.byte(NEWLINE);
		this.rowStart = this.out.length;
		return this.out.length >= FLUSH_BYTES;
	}

	/** Writes the complete rows to the file. */
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
					throw spillError(error, this.options);
				});
			done += bytesWritten;
		}
		this.written += bytes.length;
		this.out.clear();
		this.rowStart = 0;
	}
}
