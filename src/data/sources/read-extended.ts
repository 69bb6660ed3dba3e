/**
 * Converts a file of Extended JSON into plain JSON, written once into a spill file. The first rows decide whether a file is
 * Extended JSON; other files are not read twice.
 */
import { ArlError } from "../../errors.js";
import { ExtendedJsonProblem, isExtended, kindOfRow, plainValue, type RowKind } from "./extended-json.js";
import { jsonText, parseJson, RowProblem } from "./json-value.js";
import type { FileRows } from "./jsonl.js";
import { maxRowBytes } from "./row-size.js";
import type { Scratch } from "./scratch.js";
import { rowsInOrder, takeRows } from "./source.js";
import { SpillFile } from "./spill-file.js";

const FIRST_ROWS = 32;
const FIRST_BYTES = 1024 * 1024;

/** Every row of Extended JSON contains this. */
const SIGN = '"$';
/** Every row with a number of Extended JSON contains this; rare in other rows, so that the search costs nothing. */
const NUMBER_SIGN = "$number";

export interface ExtendedOptions {
	scratch: Scratch;
	signal: AbortSignal | null;
	/** Collects what a user should know about how the file is read. */
	notices: string[];
}

/** A parsed row and its kind; null: it is not JSON or too large, for which it will be refused later. */
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

/** Why a row of a file of plain JSON cannot be used: it contains numbers of Extended JSON. Null: it does not. */
export function strayExtendedJson(bytes: Uint8Array): { reason: string; message: string } | null {
	if (!bufferOf(bytes).includes(NUMBER_SIGN)) return null;
	const number = look(bytes)?.kind.number ?? null;
	if (number === null) return null;
	const message = `${number} is a number of MongoDB's Extended JSON, and the rows before it are plain JSON; write all in one form`;
	return { reason: "extended json", message };
}

async function beginsExtended(source: FileRows): Promise<boolean> {
	const first = Uint32Array.from({ length: Math.min(FIRST_ROWS, source.length) }, (_, i) => i);
	const rows = await takeRows(source, first, FIRST_BYTES);
	return rows.some((row) => {
		if (!(row instanceof Uint8Array) || !bufferOf(row).includes(SIGN)) return false;
		const seen = look(row);
		return seen !== null && isExtended(seen.kind);
	});
}

/** The evidence for the form that a file is written in; both forms at once contradict each other. */
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
			`${this.plain} is a plain number, and ${this.canonical} one of MongoDB's Extended JSON: no export mixes them`,
			"Write all rows in one form: mongoexport --jsonFormat=relaxed, or plain JSON. In Python: bson.json_util.loads reads both.",
		);
	}
}

/** The rows of `source`, converted if they are Extended JSON; closes `source` if it returns another one. */
export async function withoutExtendedJson(source: FileRows, options: ExtendedOptions): Promise<FileRows> {
	if (!(await beginsExtended(source))) return source;
	const { scratch, signal, notices } = options;
	const { name } = source;
	const form = new Form(source);
	const converted = await SpillFile.fill(
		{ scratch, name, numbered: false, locate: (row) => source.location(row), signal },
		async (spill) => {
			for await (const { row, content } of rowsInOrder(source)) {
				spill.out.raw(plainRow(content, source, row, form));
				if (spill.endRow()) await spill.flush();
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
		return Buffer.from(jsonText(plainValue(seen.row)));
	} catch (error) {
		if (!(error instanceof ExtendedJsonProblem)) throw error;
		throw new ArlError(
			"ARL_DATA",
			`${source.location(index)}: ${error.place}: ${error.message}`,
			"The file's first rows are MongoDB's Extended JSON: write all rows in that form, or none.",
		);
	}
}
