/**
 * Rows of JSON text as a Parquet file: numbers and names of a row become columns of their type, lists and objects columns of
 * JSON text, so that `read.ts` returns the same rows and any other reader can use the file. The core writes it.
 */
import { writeWhole } from "../../../disk/write-whole.js";
import { loadNative } from "../../../native.js";

/** Rows are passed to the core in batches of about this many bytes. */
const BATCH_BYTES = 1024 * 1024;

/**
 * Writes rows, each a JSON object as text, and returns their number. The file appears at `path` when it is complete. Read
 * again, each row has its keys in the order of the columns, without white space between them, and else the same text: what
 * is in lists, objects and unknown keys byte for byte.
 *
 * @throws ArlError `ARL_DATA` for a row that is no object, for a `reward`, `step`, `record_id` or `split` of another type
 * than RecordData's, and for a key that first comes after the first row group.
 */
export async function writeParquet(
	path: string,
	rows: Iterable<string | Uint8Array> | AsyncIterable<string | Uint8Array>,
): Promise<number> {
	return writeWhole(path, async (partial) => {
		const writer = loadNative().ParquetWriter.create(partial, path);
		let batch: Uint8Array[] = [];
		let bytes = 0;
		for await (const row of rows) {
			const text = typeof row === "string" ? Buffer.from(row) : row;
			batch.push(text);
			bytes += text.length;
			if (bytes < BATCH_BYTES) continue;
			await writer.write(batch);
			batch = [];
			bytes = 0;
		}
		await writer.write(batch);
		return writer.finish();
	});
}
