/**
 * Exports rows of a database to a file, JSONL or Parquet: the very text that training reads, in its order. The file appears
 * under its name only once it is complete.
 */
import { open } from "node:fs/promises";
import { maxRowBytes, rowTooLarge } from "../data/sources/row-size.js";
import { rowsInOrder } from "../data/sources/source.js";
import { type BadRow, badRowsError } from "../data/tokens/problems.js";
import { writeWhole } from "../disk/write-whole.js";
import type { DatabaseRows } from "./source.js";

const PROGRESS_ROWS = 256;
const FLUSH_BYTES = 8 * 1024 * 1024;

export interface ExportOptions {
	rows: DatabaseRows;
	out: string;
	/** Leave out documents that cannot be rows; otherwise they fail the export. */
	skip: boolean;
	/** Called with the number of rows processed. */
	progress?: (rows: number) => void;
}

export interface ExportResult {
	rows: number;
	/** The rows that were left out. */
	bad: BadRow[];
}

/** The rows one after the other; those that cannot be read go into `bad`. */
async function* readable({ rows, skip, progress }: ExportOptions, bad: BadRow[]): AsyncGenerator<Uint8Array> {
	for await (const { row, content } of rowsInOrder(rows)) {
		if (content instanceof Uint8Array && content.length <= maxRowBytes()) yield content;
		else {
			const problem = content instanceof Uint8Array ? rowTooLarge(content.length) : content;
			bad.push({ row, location: rows.location(row), ...problem });
		}
		if ((row + 1) % PROGRESS_ROWS === 0) progress?.(row + 1);
	}
	progress?.(rows.length);
	if (bad.length > 0 && !skip) throw badRowsError(bad, rows.length);
}

async function writeJsonl(path: string, rows: AsyncIterable<Uint8Array>): Promise<number> {
	return writeWhole(path, async (partial) => {
		let written = 0;
		const file = await open(partial, "w");
		try {
			let pending: Uint8Array[] = [];
			let bytes = 0;
			const newline = Buffer.from("\n");
			for await (const row of rows) {
				pending.push(row, newline);
				bytes += row.length;
				written += 1;
				if (bytes < FLUSH_BYTES) continue;
				await file.appendFile(Buffer.concat(pending));
				pending = [];
				bytes = 0;
			}
			await file.appendFile(Buffer.concat(pending));
		} finally {
			await file.close();
		}
		return written;
	});
}

/** Writes all rows. Throws `ARL_DATA` with every document that cannot be a row, unless `skip` is set. */
export async function exportRows(options: ExportOptions): Promise<ExportResult> {
	const bad: BadRow[] = [];
	const rows = readable(options, bad);
	if (!/\.parquet$/i.test(options.out)) return { rows: await writeJsonl(options.out, rows), bad };
	const { writeParquet } = await import("../data/sources/parquet/write.js");
	return { rows: await writeParquet(options.out, rows), bad };
}
