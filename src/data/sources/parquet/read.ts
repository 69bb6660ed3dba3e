/**
 * A Parquet file as rows: the core writes its columns as JSON text, row by row, into a spill file, which is then read like
 * the lines of a JSONL file.
 */
import { open, rm } from "node:fs/promises";
import { hashFile } from "../../../disk/hash-file.js";
import { toArlError } from "../../../errors.js";
import type { Native } from "../../../native.js";
import { type ColumnNames, columnsByMeaning } from "../columns.js";
import { FileRows, indexFromRanges } from "../jsonl.js";
import type { Scratch } from "../scratch.js";
import type { Remarks } from "./remarks.js";

export interface ParquetOptions {
	native: Pick<Native, "ParquetReader">;
	scratch: Scratch;
	/** What a user knows the file by, where that is not its path. */
	name: string;
	columns: ColumnNames;
	/** Gets what a user should know of the values. */
	remarks: Remarks;
	signal: AbortSignal | null;
}

/** Opens a Parquet file. Throws `ARL_DATA` where it is damaged, encrypted, or has what is not read. */
export async function openParquet(path: string, options: ParquetOptions): Promise<FileRows> {
	const { native, scratch, name, columns, remarks, signal } = options;
	const spill = scratch.newFile();
	const reader = native.ParquetReader.create({ path, name, spill, ...columnsByMeaning(columns) });
	const cancel = () => reader.cancel();
	signal?.addEventListener("abort", cancel);
	if (signal?.aborted) cancel();
	try {
		const { ranges, leftOut, notFinite } = await reader.read();
		remarks.add(leftOut, notFinite);
		const handle = await open(spill, "r");
		try {
			return new FileRows(name, handle, indexFromRanges(ranges, await hashFile(handle)), (row) => `${name}[${row}]`);
		} catch (error) {
			await handle.close();
			throw error;
		}
	} catch (error) {
		throw toArlError(error);
	} finally {
		signal?.removeEventListener("abort", cancel);
		// The open handle keeps the content.
		await rm(spill, { force: true });
	}
}
