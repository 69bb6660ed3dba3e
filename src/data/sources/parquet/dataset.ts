/**
 * Rows of Parquet files as a data set, under the name and with the options that AgentRL gives it. The trainer reads the files
 * directly; iterating over the data set yields each row as an object.
 */
import { fileURLToPath } from "node:url";
import type { AgentTrainingConfig, AgentTrainingConfigInput } from "../../../config/schema.js";
import { loadNative } from "../../../native.js";
import { openFiles } from "../open.js";
import type { RecordData } from "../record.js";

export interface ParquetDatasetOptions {
	/** Files, folders or globs. */
	file_paths: string | URL | readonly (string | URL)[];
	/** Options of the run; `columns` says which columns are which. */
	args?: AgentTrainingConfig | Partial<AgentTrainingConfigInput>;
	/** Which files of a folder are meant; absent: `args.split`, else `train`. */
	split?: string | null;
}

const ROWS_AT_ONCE = 64;

/** `train_dataset` of Parquet files. */
export class ParquetDataset implements AsyncIterable<RecordData> {
	readonly file_paths: readonly string[];
	/** Null: all files of a folder. */
	readonly split: string | null;
	/** Names of columns that differ from the known ones. */
	readonly columns: Readonly<Record<string, string>>;

	constructor({ file_paths, args, split }: ParquetDatasetOptions) {
		const paths = typeof file_paths === "string" || file_paths instanceof URL ? [file_paths] : file_paths;
		this.file_paths = paths.map((path) => (path instanceof URL ? fileURLToPath(path) : path));
		this.split = split !== undefined ? split : args?.split !== undefined ? args.split : "train";
		this.columns = args?.columns ?? {};
	}

	/** Each row as an object: a float that is a whole number becomes a JavaScript number like any other. */
	async *[Symbol.asyncIterator](): AsyncGenerator<RecordData> {
		const { source } = await openFiles(loadNative(), this.file_paths, { split: this.split, columns: this.columns });
		try {
			for (let from = 0; from < source.length; from += ROWS_AT_ONCE) {
				const count = Math.min(ROWS_AT_ONCE, source.length - from);
				const rows = await source.read(Array.from({ length: count }, (_, i) => from + i));
				for (const row of rows) yield JSON.parse(Buffer.from(row).toString("utf8"));
			}
		} finally {
			await source.close();
		}
	}
}
