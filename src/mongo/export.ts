/**
 * Rows of a database as a file, JSONL or Parquet: the very text that training reads, in the order in which it lists them.
 * Nothing stands at the file's name before all of it does.
 */
import { open } from "node:fs/promises";
import { maxRowBytes, rowTooLarge } from "../data/sources/row-size.js";
import { type BadRow, badRowsError } from "../data/tokens/problems.js";
import { writeWhole } from "../disk/write-whole.js";
import type { DatabaseRows } from "./source.js";

const READ_ROWS = 256;
const READ_BYTES = 8 * 1024 * 1024;

export interface ExportOptions {
	rows: DatabaseRows;
	out: string;
	/** Documents that cannot be rows are left out; else they end the export. */
	skip: boolean;
	/** Hears how many rows are through. */
	progress?: (rows: number) => void;
}

export interface ExportResult {
	rows: number;
	/** What was left out. */
	bad: BadRow[];
}

/** The rows one after the other; those that cannot be read are put into `bad`. */
async function* readable({ rows, skip, progress }: ExportOptions, bad: BadRow[]): AsyncGenerator<Uint8Array> {
	for (let next = 0; next < rows.length; ) {
		const indexes: number[] = [];
		for (let bytes = 0; next < rows.length && indexes.length < READ_ROWS && bytes < READ_BYTES; next++) {
			indexes.push(next);
			bytes += rows.bytes(next);
		}
		for (const [i, content] of (await rows.read(indexes)).entries()) {
			const row = indexes[i] ?? 0;
			if (content instanceof Uint8Array && content.length <= maxRowBytes()) yield content;
			else if (content instanceof Uint8Array) {
				bad.push({ row, location: rows.location(row), ...rowTooLarge(content.length) });
			} else bad.push({ row, location: rows.location(row), ...content });
		}
		progress?.(next);
	}
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
				if (bytes < READ_BYTES) continue;
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

/** Writes all rows. Throws `ARL_DATA` for documents that cannot be rows, all of them told, unless they are to be skipped. */
export async function exportRows(options: ExportOptions): Promise<ExportResult> {
	const bad: BadRow[] = [];
	const rows = readable(options, bad);
	if (!/\.parquet$/i.test(options.out)) return { rows: await writeJsonl(options.out, rows), bad };
	const { writeParquet } = await import("../data/sources/parquet/write.js");
	return { rows: await writeParquet(options.out, rows), bad };
}
