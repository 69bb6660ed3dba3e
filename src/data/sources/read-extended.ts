/**
 * A file of Extended JSON as rows of plain JSON, written once into a spool file. Whether a file is of that kind, its first rows
 * say; of others nothing is read twice.
 */
import { ArlError } from "../../errors.js";
import { ExtendedJsonProblem, isExtended, kindOfRow, plainText, plainValue, type RowKind } from "./extended-json.js";
import { parseJson, RowProblem } from "./json-value.js";
import type { FileRows } from "./jsonl.js";
import { maxRowBytes } from "./row-size.js";
import type { Scratch } from "./scratch.js";
import { takeRows } from "./source.js";
import { SpillFile } from "./spill-file.js";

const FIRST_ROWS = 32;
const FIRST_BYTES = 1024 * 1024;
const READ_ROWS = 256;
const READ_BYTES = 8 * 1024 * 1024;

/** What every row of that kind has. */
const SIGN = '"$';
/** What a row with a number of that kind has; rare in others, so that looking for it costs nothing. */
const NUMBER_SIGN = "$number";

export interface ExtendedOptions {
	scratch: Scratch;
	signal: AbortSignal | null;
	/** Gets what a user should know of how the file is read. */
	notices: string[];
}

function firstIndexes(from: number, source: FileRows, most: number): Uint32Array {
	return Uint32Array.from({ length: Math.min(most, source.length - from) }, (_, i) => from + i);
}

/** What a row tells; null: it is no JSON, or too large, and will be refused as what it is. */
function look(bytes: Uint8Array): { row: ReturnType<typeof parseJson>; kind: RowKind } | null {
	if (bytes.length > maxRowBytes()) return null;
	try {
		const row = parseJson(bytes);
		return { row, kind: kindOfRow(row) };
	} catch (error) {
		if (error instanceof RowProblem) return null;
		throw error;
	}
}

function bufferOf(bytes: Uint8Array): Buffer {
	return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** Why a row of a file that is plain JSON cannot be used: it has numbers of Extended JSON. Null: it has none. */
export function strayExtendedJson(bytes: Uint8Array): { reason: string; message: string } | null {
	if (!bufferOf(bytes).includes(NUMBER_SIGN)) return null;
	const number = look(bytes)?.kind.number ?? null;
	if (number === null) return null;
	const message = `${number} is a number of MongoDB's Extended JSON, and the rows before it are plain JSON; write all in one form`;
	return { reason: "extended json", message };
}

async function beginsExtended(source: FileRows): Promise<boolean> {
	const rows = await takeRows(source, firstIndexes(0, source, FIRST_ROWS), FIRST_BYTES);
	return rows.some((row) => {
		if (!(row instanceof Uint8Array) || !bufferOf(row).includes(SIGN)) return false;
		const seen = look(row);
		return seen !== null && isExtended(seen.kind);
	});
}

/** The places that tell which form a file is written in; both at once contradict each other. */
class Form {
	canonical: string | null = null;
	plain: string | null = null;

	constructor(private readonly source: FileRows) {}

	add(index: number, kind: RowKind): void {
		const at = (place: string | null) => (place === null ? null : `${this.source.location(index)}: ${place}`);
		this.canonical ??= at(kind.canonical);
		this.plain ??= at(kind.plain);
		if (this.canonical === null || this.plain === null) return;
		throw new ArlError(
			"ARL_DATA",
			`${this.plain} is a plain number, and ${this.canonical} one of MongoDB's Extended JSON: no export has both`,
			"Write all rows in one form: mongoexport --jsonFormat=relaxed, or plain JSON. In Python: bson.json_util.loads reads both.",
		);
	}
}

/** The rows of `source`; those of Extended JSON as the values that they stand for. Closes `source` where it gives another. */
export async function withoutExtendedJson(source: FileRows, options: ExtendedOptions): Promise<FileRows> {
	if (!(await beginsExtended(source))) return source;
	const { scratch, signal, notices } = options;
	const { name } = source;
	const form = new Form(source);
	const converted = await SpillFile.fill(
		{ scratch, name, numbered: false, locate: (row) => source.location(row), signal },
		async (spool) => {
			for (let next = 0; next < source.length; ) {
				const rows = await takeRows(source, firstIndexes(next, source, READ_ROWS), READ_BYTES);
				for (const row of rows) {
					spool.out.raw(plainRow(row as Uint8Array, source, next, form));
					next += 1;
					if (spool.endRow()) await spool.flush();
				}
			}
			return { blankLines: source.blankLines };
		},
	);
	await source.close();
	const kind = form.canonical === null ? "relaxed" : "canonical";
	notices.push(
		`${name}: read as MongoDB's Extended JSON (${kind} form): values such as {"$oid": "..."} became plain JSON`,
	);
	return converted;
}

function plainRow(bytes: Uint8Array, source: FileRows, index: number, form: Form): Uint8Array {
	const seen = look(bytes);
	if (seen === null) return bytes;
	form.add(index, seen.kind);
	try {
		return Buffer.from(plainText(plainValue(seen.row)));
	} catch (error) {
		if (!(error instanceof ExtendedJsonProblem)) throw error;
		throw new ArlError(
			"ARL_DATA",
			`${source.location(index)}: ${error.place}: ${error.message}`,
			"The file's first rows are MongoDB's Extended JSON: write all of it so, or none.",
		);
	}
}
