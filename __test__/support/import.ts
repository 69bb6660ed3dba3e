/** Importing rows in tests: files of rows, and what an import of them leaves in the database. */
import { mkdtempSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openFiles } from "../../src/data/sources/open.js";
import { MongoConnection } from "../../src/mongo/connection.js";
import { openDatabaseRows } from "../../src/mongo/database.js";
import type { Split } from "../../src/mongo/documents.js";
import { checkImport, importRows } from "../../src/mongo/import.js";
import type { ImportKind } from "../../src/mongo/to-documents.js";
import { loadNative } from "../../src/native.js";
import { type MongoServer, newDatabase } from "./mongo.js";

const native = loadNative();

/** A JSONL file of rows below `folder`. */
export function rowsFile(folder: string, rows: string[]): string {
	const path = join(mkdtempSync(join(folder, "rows-")), "rows.jsonl");
	writeFileSync(path, rows.map((row) => `${row}\n`).join(""));
	return path;
}

/** A row of one question and the reply `text`; `more`: what follows the messages. */
export const chat = (text: string, more = "") =>
	`{"messages":[{"role":"user","content":"?"},{"role":"assistant","content":${JSON.stringify(text)}}]${more}}`;

interface Given {
	kind?: ImportKind;
	split?: Split;
}

/** Imports a file. */
export async function importFile(
	connection: MongoConnection,
	path: string,
	{ kind = "DBRecordData", split }: Given = {},
) {
	const { source } = await openFiles(native, [path]);
	try {
		return await importRows(connection, { source, kind, split: split ?? null });
	} finally {
		await source.close();
	}
}

/** The rows of a file that cannot be imported. */
export async function check(path: string, { kind = "DBRecordData", split }: Given = {}) {
	const { source } = await openFiles(native, [path]);
	try {
		return await checkImport({ source, kind, split: split ?? null });
	} finally {
		await source.close();
	}
}

/** The rows that training reads, as text. */
export async function rowsOf(
	connection: MongoConnection,
	source: "DBRecordData" | "Record",
	split: string | null = null,
) {
	const rows = await openDatabaseRows(connection, {
		db_source: source,
		split,
		db_match: {},
		max_trained_count: null,
		retrained_interval: 1,
	});
	const contents = await rows.read(Array.from({ length: rows.length }, (_, row) => row));
	return contents.map((row) => (row instanceof Uint8Array ? Buffer.from(row).toString("utf8") : row));
}

/** A connection to a new database, which is dropped in the end. */
export async function fresh<T>(server: MongoServer, use: (connection: MongoConnection) => Promise<T>): Promise<T> {
	const connection = await MongoConnection.open(server.uriOf(newDatabase()));
	try {
		return await use(connection);
	} finally {
		await connection.db.dropDatabase();
		await connection.close();
	}
}
