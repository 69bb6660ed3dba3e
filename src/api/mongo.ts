/**
 * The entry `arl/mongo`: reads, imports and exports rows of AgentRL's collections. Options have the names and meaning that they
 * have in the configuration. The first call loads MongoDB's driver, importing this module does not.
 */
import type { ConvertRecordToData } from "../data/sources/convert.js";
import { type Dataset, type IndexedDataset, openDataset } from "../data/sources/custom.js";
import { openFiles } from "../data/sources/open.js";
import type { RecordData } from "../data/sources/record.js";
import { Scratch } from "../data/sources/scratch.js";
import { type AnySource, type RowContent, rowsInOrder } from "../data/sources/source.js";
import type { BadRow } from "../data/tokens/problems.js";
import { ArlError } from "../errors.js";
import type { MongoConnection } from "../mongo/connection.js";
import type { Split } from "../mongo/documents.js";
import type { ExportResult } from "../mongo/export.js";
import type { ImportResult } from "../mongo/import.js";
import type { DatabaseRows } from "../mongo/source.js";
import type { DatabaseStatus } from "../mongo/status.js";
import type { ImportKind } from "../mongo/to-documents.js";
import { loadNative } from "../native.js";

export type { ConvertRecordToData, ConvertResult, DatabaseRecord } from "../data/sources/convert.js";
export type { BadRow } from "../data/tokens/problems.js";
export type { CollectionName, Split } from "../mongo/documents.js";
export type { ExportResult } from "../mongo/export.js";
export type { ImportResult } from "../mongo/import.js";
export type { CollectionStatus, Counts, DatabaseStatus, MissingIndex } from "../mongo/status.js";
export type { ImportKind } from "../mongo/to-documents.js";

/** A database. */
export interface DatabaseOptions {
	/** `mongodb://USER:PASSWORD@HOST/DB?authSource=admin` */
	db_connection_string: string;
	/** Stops retrying while the server cannot be reached. */
	signal?: AbortSignal;
}

/** Which documents of a database are rows. */
export interface MongoRowsOptions extends DatabaseOptions {
	/** The collection; absent or `auto`: the one that has rows. */
	db_source?: "auto" | "Record" | "DBRecordData";
	/** An additional condition in Extended JSON. */
	db_match?: Record<string, unknown>;
	/** The split; null: all. Absent: `train`. */
	split?: string | null;
	/** Only documents that were trained less often; absent or null: all. */
	max_trained_count?: number | null;
	/** Converts a record with its samples into rows; absent: as training does. */
	convert_record_to_data_func?: ConvertRecordToData;
}

/**
 * The rows of a database as they were when it was opened: an `IndexedDataset`, and an async iterable that reads in batches.
 * Keeps a connection open until it is closed; `await using` closes it.
 */
export class MongoRows implements IndexedDataset, AsyncIterable<RecordData>, AsyncDisposable {
	/** Hosts, database and collection, for people. */
	readonly name: string;
	readonly length: number;
	readonly identity: string;

	private constructor(private readonly rows: DatabaseRows) {
		this.name = rows.name;
		this.length = rows.length;
		this.identity = rows.identity;
	}

	/**
	 * Lists the rows of a database.
	 *
	 * @throws ArlError `ARL_DATA` if there are none, `ARL_CONFIG` if the options are wrong, `ARL_IO` if no server responds.
	 */
	static async open(options: MongoRowsOptions): Promise<MongoRows> {
		const connection = await connect(options);
		try {
			return new MongoRows(await databaseRows(connection, options));
		} catch (error) {
			await connection.close();
			throw error;
		}
	}

	/** Row `index`. @throws ArlError `ARL_DATA` if its document cannot be a row. */
	async get(index: number): Promise<RecordData> {
		const [content] = await this.rows.read([index]);
		return this.parsed(index, content as RowContent);
	}

	async *[Symbol.asyncIterator](): AsyncGenerator<RecordData> {
		for await (const { row, content } of rowsInOrder(this.rows)) yield this.parsed(row, content);
	}

	private parsed(row: number, content: RowContent): RecordData {
		if (content instanceof Uint8Array) return JSON.parse(Buffer.from(content).toString("utf8"));
		throw new ArlError("ARL_DATA", `${this.rows.location(row)}: ${content.reason}: ${content.message}`);
	}

	/** Closes the connection. */
	async close(): Promise<void> {
		await this.rows.close();
	}

	/** The same as `close`. */
	[Symbol.asyncDispose](): Promise<void> {
		return this.close();
	}
}

async function connect({ db_connection_string, signal }: DatabaseOptions): Promise<MongoConnection> {
	const { MongoConnection } = await import("../mongo/connection.js");
	return MongoConnection.open(db_connection_string, { signal: signal ?? null });
}

async function databaseRows(connection: MongoConnection, options: MongoRowsOptions): Promise<DatabaseRows> {
	const { openDatabaseRows } = await import("../mongo/database.js");
	const { db_source = "auto", db_match = {}, split = "train", max_trained_count = null } = options;
	const match = db_match as Parameters<typeof openDatabaseRows>[1]["db_match"];
	const selection = { db_source, db_match: match, split, max_trained_count, retrained_interval: 1 };
	return openDatabaseRows(connection, selection, options.convert_record_to_data_func);
}

/** Connects, runs `use`, and closes the connection. */
async function withDatabase<T>(options: DatabaseOptions, use: (connection: MongoConnection) => Promise<T>): Promise<T> {
	const connection = await connect(options);
	try {
		return await use(connection);
	} finally {
		await connection.close();
	}
}

/** What happens to rows that cannot be used. */
export interface BadRowOptions {
	/** `error` (the default): nothing is written; `skip`: such rows are left out. */
	on_bad_row?: "error" | "skip";
	/** Called with the number of rows processed. */
	progress?: (rows: number) => void;
}

export interface MongoExportOptions extends MongoRowsOptions, BadRowOptions {
	/** A `.jsonl` or `.parquet` file, which is replaced. */
	out: string;
}

/**
 * Exports the rows of a database: the very text that training reads, in its order. The file appears once it is complete.
 *
 * @throws ArlError `ARL_DATA` if a document cannot be a row, and as `MongoRows.open`.
 */
export async function exportRows(options: MongoExportOptions): Promise<ExportResult> {
	const { exportRows: write } = await import("../mongo/export.js");
	return withDatabase(options, async (connection) => {
		const { out, on_bad_row, progress } = options;
		const rows = await databaseRows(connection, options);
		return write({ rows, out, skip: on_bad_row === "skip", ...(progress && { progress }) });
	});
}

export interface MongoImportOptions extends DatabaseOptions, BadRowOptions {
	/** Files, folders or patterns as in `train_file`, or a dataset. */
	rows: string | Dataset;
	/** `DBRecordData` (the default): a document per row; `Record`: with a task, and a sample per trained reply. */
	as?: ImportKind;
	/** The split of rows that name none; absent or null: train. */
	split?: Split | null;
}

/** The result of an import, and the rows that were left out. */
export interface MongoImportResult extends ImportResult {
	bad: BadRow[];
}

/**
 * Imports rows with `messages` into AgentRL's collections. All rows are checked before the first is written; rows that are there
 * already are skipped, so that repeating an import duplicates nothing.
 *
 * @throws ArlError `ARL_DATA` if a row cannot be imported, and as `MongoRows.open`.
 */
export async function importRows(options: MongoImportOptions): Promise<MongoImportResult> {
	const { importChecked } = await import("../mongo/import.js");
	const { rows, as = "DBRecordData", split = null, on_bad_row, progress } = options;
	return withDatabase(options, async (connection) => {
		const scratch = new Scratch(loadNative());
		try {
			const source = await importSource(rows, scratch, options.signal ?? null);
			try {
				const given = { source, kind: as, split, ...(progress && { progress }) };
				return await importChecked(connection, given, on_bad_row === "skip");
			} finally {
				await source.close();
			}
		} finally {
			scratch.close();
		}
	});
}

async function importSource(rows: string | Dataset, scratch: Scratch, signal: AbortSignal | null): Promise<AnySource> {
	if (typeof rows === "string") return (await openFiles(loadNative(), [rows], { scratch, signal })).source;
	return openDataset(rows, {
		streamed: null,
		ahead: 0,
		about: () => ({ identity: "", ledger: null }),
		signal,
		most: Number.POSITIVE_INFINITY,
		progress: () => {},
		scratch,
	});
}

/** Counts what AgentRL's collections contain, and finds missing indexes. Changes nothing. */
export async function databaseStatus(options: DatabaseOptions): Promise<DatabaseStatus> {
	const { databaseStatus: count } = await import("../mongo/status.js");
	return withDatabase(options, count);
}
