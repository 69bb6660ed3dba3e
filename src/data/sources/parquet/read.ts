/**
 * A Parquet file as rows: its columns become JSON text, row by row, in a spool file; from then on they are like the lines of
 * a JSONL file. What is held at once is a page of each column, whatever the size of the row groups.
 */

import { open } from "node:fs/promises";
import { setImmediate } from "node:timers/promises";
import type { FileMetaData, RowGroup } from "hyparquet";
import { ArlError, messageOf, toArlError } from "../../../errors.js";
import type { ColumnNames } from "../columns.js";
import { keyBytes } from "../json-bytes.js";
import type { FileRows } from "../jsonl.js";
import type { Scratch } from "../scratch.js";
import { SpillFile } from "../spill-file.js";
import { loadCodecs, type Unpack, type UnpackNative } from "./codecs.js";
import { type Node, TreeBuilder } from "./nodes.js";
import { type ColumnNotes, NOTES_KEY } from "./notes.js";
import type { Remarks } from "./remarks.js";

/** Bytes that are read ahead, of all columns together. */
const READ_AHEAD = 32 * 1024 * 1024;
const MAX_FOOTER_BYTES = 1024 ** 3;

export interface ParquetOptions {
	native: UnpackNative;
	scratch: Scratch;
	/** What a user knows the file by, where that is not its path. */
	name: string;
	columns: ColumnNames;
	/** Gets what a user should know of the values. */
	remarks: Remarks;
	signal: AbortSignal | null;
}

function damaged(name: string, what: string, cause?: unknown): ArlError {
	return new ArlError("ARL_DATA", `${name}: ${what}`, "The file is damaged or not complete: copy or write it again.", {
		cause,
	});
}

function encrypted(name: string): ArlError {
	return new ArlError("ARL_DATA", `${name}: the Parquet file is encrypted`, "Write it without encryption.");
}

async function readMetadata(handle: Awaited<ReturnType<typeof open>>, name: string): Promise<FileMetaData> {
	const { size } = await handle.stat();
	const tail = Buffer.alloc(8);
	if (size < 12) throw damaged(name, "the Parquet file ends early");
	await handle.read(tail, 0, 8, size - 8);
	const mark = tail.toString("latin1", 4);
	if (mark === "PARE") throw encrypted(name);
	if (mark !== "PAR1")
		throw damaged(name, "the Parquet file has no end mark: it was cut off, or is still being written");
	const length = tail.readUInt32LE(0);
	if (length + 12 > size || length > MAX_FOOTER_BYTES) {
		throw damaged(name, `the Parquet file's description of itself would have ${length} bytes of ${size}`);
	}
	const footer = Buffer.alloc(length + 8);
	await handle.read(footer, 0, footer.length, size - footer.length);
	const { parquetMetadata } = await import("hyparquet");
	try {
		return parquetMetadata(footer, { geoparquet: false });
	} catch (error) {
		throw damaged(name, `the Parquet file's description of itself cannot be read: ${String(error)}`, error);
	}
}

/** What the writer of this program noted of the columns. */
function readNotes(metadata: FileMetaData): ColumnNotes {
	const notes: ColumnNotes = { json: [], absent: [] };
	const text = metadata.key_value_metadata?.find(({ key }) => key === NOTES_KEY)?.value;
	if (text === undefined) return notes;
	try {
		const { json, absent } = JSON.parse(text) as Partial<Record<keyof ColumnNotes, unknown>>;
		if (Array.isArray(json)) notes.json = json.map(String);
		if (Array.isArray(absent)) notes.absent = absent.map(String);
	} catch {
		// A note that cannot be read is none.
	}
	return notes;
}

/** A file's columns with all that is needed to write its rows. */
interface Table {
	name: string;
	fd: number;
	metadata: FileMetaData;
	builder: TreeBuilder;
	columns: { key: Buffer; node: Node; absent: boolean }[];
	codecs: Map<string, Unpack>;
}

async function openTable(fd: number, metadata: FileMetaData, options: ParquetOptions): Promise<Table> {
	const { name } = options;
	const { parquetSchema } = await import("hyparquet");
	const notes = readNotes(metadata);
	const builder = new TreeBuilder(options.columns, new Set(notes.json), options.remarks);
	const absent = new Set(notes.absent);
	const columns = ((): Table["columns"] => {
		try {
			return parquetSchema(metadata).children.map((child) => ({
				key: keyBytes(child.element.name),
				node: builder.column(child),
				absent: absent.has(child.element.name),
			}));
		} catch (error) {
			throw damaged(name, `the Parquet file's schema cannot be read: ${String(error)}`, error);
		}
	})();
	if (columns.length === 0) throw new ArlError("ARL_DATA", `${name}: the Parquet file has no columns`);
	const codecs = metadata.row_groups.flatMap(({ columns: chunks }) =>
		chunks.flatMap(({ meta_data: chunk }) => (chunk ? [chunk.codec] : [])),
	);
	try {
		return { name, fd, metadata, builder, columns, codecs: await loadCodecs(options.native, codecs) };
	} catch (error) {
		const codec = messageOf(error);
		const hint = "Write it with zstd, snappy, gzip, brotli or lz4.";
		throw new ArlError("ARL_DATA", `${name}: pages compressed with ${codec}, which is not read`, hint);
	}
}

function openGroup(table: Table, group: RowGroup, index: number): void {
	const { name, builder, codecs, fd } = table;
	const readAhead = Math.max(16 * 1024, Math.min(1024 * 1024, Math.floor(READ_AHEAD / builder.leaves.length)));
	if (group.columns.length !== builder.leaves.length) {
		throw damaged(name, `row group ${index} has ${group.columns.length} columns of ${builder.leaves.length}`);
	}
	for (const [i, leaf] of builder.leaves.entries()) {
		const column = group.columns[i];
		if (column?.crypto_metadata || column?.encrypted_column_metadata) throw encrypted(name);
		const chunk = column?.meta_data;
		if (!chunk || chunk.path_in_schema.join(".") !== leaf.path.join(".")) {
			throw damaged(name, `row group ${index} does not say where column ${leaf.path.join(".")} is`);
		}
		if (column.file_path) {
			throw new ArlError("ARL_DATA", `${name}: column ${leaf.path.join(".")} is in another file (${column.file_path})`);
		}
		const unpack = codecs.get(chunk.codec);
		if (!unpack) throw damaged(name, `row group ${index} names no codec for column ${leaf.path.join(".")}`);
		leaf.open({ fd, chunk, unpack, readAhead, name, group: index });
	}
}

const MILLISECONDS_BETWEEN_PAUSES = 20;

async function writeRows(table: Table, spool: SpillFile): Promise<void> {
	const { name, builder, columns, metadata } = table;
	const { out } = spool;
	let paused = performance.now();
	for (const [index, group] of metadata.row_groups.entries()) {
		openGroup(table, group, index);
		for (let row = Number(group.num_rows); row > 0; row--) {
			let separator = 0x7b;
			for (const { key, node, absent } of columns) {
				if (absent && node.isNull) {
					node.skip();
					continue;
				}
				out.byte(separator);
				separator = 0x2c;
				out.raw(key);
				node.writeOrNull(out);
			}
			if (separator === 0x7b) out.byte(separator);
			out.byte(0x7d);
			for (const leaf of builder.leaves) {
				if (leaf.next() !== 0)
					throw leaf.damaged(new Error(`it is not at the same row as the others (row ${spool.rows})`));
			}
			if (spool.endRow()) await spool.flush();
			// Unpacking and writing rows would let no signal through for as long as the buffer takes to fill.
			if (performance.now() - paused > MILLISECONDS_BETWEEN_PAUSES) {
				await setImmediate();
				paused = performance.now();
			}
		}
		for (const leaf of builder.leaves) {
			if (!leaf.ended) throw leaf.damaged(new Error("it has more entries than the row group has rows"));
		}
	}
	// Some writers leave the sum at 0.
	if (metadata.num_rows !== 0n && spool.rows !== Number(metadata.num_rows)) {
		throw damaged(
			name,
			`the Parquet file says to have ${metadata.num_rows} rows, and its row groups have ${spool.rows}`,
		);
	}
}

/** Opens a Parquet file. Throws `ARL_DATA` where it is damaged, encrypted, or has what is not read. */
export async function openParquet(path: string, options: ParquetOptions): Promise<FileRows> {
	const { name } = options;
	const handle = await open(path, "r").catch((error: unknown) => {
		throw toArlError(error);
	});
	try {
		const metadata = await readMetadata(handle, name);
		if (metadata.row_groups.every(({ num_rows: rows }) => rows === 0n)) {
			throw new ArlError("ARL_DATA", `${name}: the Parquet file has no rows`, "Is it the right one?");
		}
		const table = await openTable(handle.fd, metadata, options);
		const locate = (row: number) => `${name}[${row}]`;
		const { scratch, signal } = options;
		return await SpillFile.fill({ scratch, name, numbered: false, locate, signal }, async (spool) => {
			await writeRows(table, spool);
			return { blankLines: 0 };
		});
	} finally {
		await handle.close();
	}
}
