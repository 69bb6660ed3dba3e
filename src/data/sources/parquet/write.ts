/**
 * Rows of JSON text as a Parquet file: numbers and names of a row become columns of their type, lists and objects columns of
 * JSON text, so that `read.ts` gives the same rows back and any other reader can use the file.
 */
import type { SchemaElement } from "hyparquet";
import { writeWhole } from "../../../disk/write-whole.js";
import { ArlError } from "../../../errors.js";
import { objectEntries } from "../json-scan.js";
import { type ColumnNotes, NOTES_KEY } from "./notes.js";

type Kind = "json" | "string" | "float" | "integer";

/** RecordData's fields, and the split that a database gives its rows. Any other key becomes a column of JSON. */
const FIELDS: readonly [name: string, kind: Kind][] = [
	["messages", "json"],
	["tools", "json"],
	["scores", "json"],
	["advantages", "json"],
	["created_at_step", "json"],
	["logprobs", "json"],
	["reward", "float"],
	["step", "integer"],
	["record_id", "string"],
	["split", "string"],
];

const ELEMENTS: Readonly<Record<Kind, Pick<SchemaElement, "type" | "converted_type">>> = {
	json: { type: "BYTE_ARRAY", converted_type: "UTF8" },
	string: { type: "BYTE_ARRAY", converted_type: "UTF8" },
	float: { type: "DOUBLE" },
	integer: { type: "INT64" },
};

/** A row group ends at this many rows, or at this many bytes of text. */
const GROUP_ROWS = 10_000;
const GROUP_BYTES = 64 * 1024 * 1024;

const EXPECTED: Readonly<Record<Kind, string>> = {
	json: "a value",
	string: "a string",
	float: "a number",
	integer: "an integer of 64 bits",
};

type Value = string | number | bigint | null;

/** A value's text as a value of the column's type; undefined: it is none. */
function columnValue(kind: Kind, text: string): Value | undefined {
	if (kind === "json") return text;
	if (text === "null") return null;
	const value = parse(text);
	if (kind === "string") return typeof value === "string" ? value : undefined;
	if (typeof value !== "number") return undefined;
	const digits = /^-?\d+$/.test(text) ? BigInt(text) : null;
	if (kind === "float") return digits === null || BigInt(value) === digits ? value : undefined;
	return digits !== null && BigInt.asIntN(64, digits) === digits ? digits : undefined;
}

function parse(text: string): unknown {
	try {
		return JSON.parse(text);
	} catch {
		return undefined;
	}
}

class Column {
	values: (Value | undefined)[] = [];
	/** Whether a row had the key with null as its value; JSON text says that itself. */
	sawNull = false;

	constructor(
		readonly name: string,
		readonly kind: Kind,
	) {}

	get element(): SchemaElement {
		return { name: this.name, repetition_type: "OPTIONAL", ...ELEMENTS[this.kind] };
	}
}

/** The columns of a file with the rows that are not written yet. */
class Columns {
	private readonly byName = new Map<string, Column>(FIELDS.map(([name, kind]) => [name, new Column(name, kind)]));
	/** Once a row group is written, no column can be added. */
	private closed = false;
	rows = 0;
	bytes = 0;

	constructor(private readonly path: string) {}

	add(row: Uint8Array, number: number): void {
		const wrong = (what: string, hint = "") => new ArlError("ARL_DATA", `${this.path}: row ${number}: ${what}`, hint);
		const entries = objectEntries(row);
		if (entries === null) throw wrong("is no JSON object");
		for (const [key, bytes] of entries) {
			let column = this.byName.get(key);
			if (column === undefined) {
				if (this.closed) {
					throw wrong(
						`has the key ${JSON.stringify(key)}, which none of the first rows has`,
						"A Parquet file has the same columns throughout: write JSONL, or give each row the key.",
					);
				}
				column = new Column(key, "json");
				this.byName.set(key, column);
			}
			const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("utf8");
			const value = columnValue(column.kind, text);
			if (value === undefined) throw wrong(`${key}: expected ${EXPECTED[column.kind]}, got ${text.slice(0, 80)}`);
			if (value === null) column.sawNull = true;
			column.values[this.rows] = value;
		}
		this.rows += 1;
		this.bytes += row.length;
	}

	/** The rows so far as columns of one length, and takes them out. */
	take(): { name: string; data: (Value | undefined)[] }[] {
		this.closed = true;
		const data = [...this.byName.values()].map((column) => {
			const values = Array.from({ length: this.rows }, (_, row) => column.values[row]);
			column.values = [];
			return { name: column.name, data: values };
		});
		this.rows = 0;
		this.bytes = 0;
		return data;
	}

	get schema(): SchemaElement[] {
		const elements = [...this.byName.values()].map((column) => column.element);
		return [{ name: "schema", num_children: elements.length, repetition_type: "REQUIRED" }, ...elements];
	}

	get notes(): ColumnNotes {
		const columns = [...this.byName.values()];
		const names = (which: Column[]) => which.map(({ name }) => name);
		return {
			json: names(columns.filter(({ kind }) => kind === "json")),
			absent: names(columns.filter(({ kind, sawNull }) => kind === "json" || !sawNull)),
		};
	}
}

/**
 * Writes rows, each a JSON object as text, and gives their number. Nothing stands at `path` before all of it does. Read
 * again, each row has its keys in the order of the columns, without white space between them, and else the same text: what
 * lies in lists, objects and unknown keys byte for byte.
 *
 * @throws ArlError `ARL_DATA` for a row that is no object, for a `reward`, `step`, `record_id` or `split` of another type
 * than RecordData's, and for a key that comes up after the first row group.
 */
export async function writeParquet(
	path: string,
	rows: Iterable<string | Uint8Array> | AsyncIterable<string | Uint8Array>,
): Promise<number> {
	const { ParquetWriter, fileWriter } = await import("hyparquet-writer");
	return writeWhole(path, async (partial) => {
		let written = 0;
		const columns = new Columns(path);
		let file: InstanceType<typeof ParquetWriter> | null = null;
		const flush = async () => {
			const columnData = columns.take();
			file ??= new ParquetWriter({ writer: fileWriter(partial), schema: columns.schema, createdBy: "arl" });
			await file.write({ columnData, rowGroupSize: GROUP_ROWS });
		};
		for await (const row of rows) {
			columns.add(typeof row === "string" ? Buffer.from(row) : row, written);
			written += 1;
			if (columns.rows >= GROUP_ROWS || columns.bytes >= GROUP_BYTES) await flush();
		}
		if (columns.rows > 0 || file === null) await flush();
		const last = file as InstanceType<typeof ParquetWriter> | null;
		if (last !== null) {
			last.kvMetadata = [{ key: NOTES_KEY, value: JSON.stringify(columns.notes) }];
			await last.finish();
		}
		return written;
	});
}
