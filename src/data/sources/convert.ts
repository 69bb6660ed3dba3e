/**
 * Rows from a user's code: what a converting function may be, and its calls in order, each failure reported with its row.
 */
import { ArlError, messageOf } from "../../errors.js";
import { explainRow } from "./explain.js";
import type { RecordData } from "./record.js";
import { recordText } from "./record-json.js";
import { maxRowBytes, rowTooLarge } from "./row-size.js";
import { type AnySource, type RowContent, rowsInOrder, type UnreadableRow } from "./source.js";

/** A database's record with the samples that it links to: the argument of a converting function for rows of a database. */
export interface DatabaseRecord {
	record: unknown;
	trajectory: unknown[];
}

/** What a converting function returns for a row: one row, several, or null to leave it out. */
export type ConvertResult = RecordData | RecordData[] | null;

/**
 * Converts a raw row (a file's row as parsed, an item of `train_dataset`, or a database's record) into training rows. It must
 * return the same for the same row each time, or a run cannot be resumed.
 */
export type ConvertRecordToData<Row = DatabaseRecord> = (row: Row) => ConvertResult | Promise<ConvertResult>;

/** A row before it has a number: its bytes, or why it cannot be read, and its location. */
export interface MadeRow {
	row: RowContent;
	location: string;
}

/** A raw row: its value, or why it cannot be read. */
export interface RawRow {
	value: unknown;
	failure: UnreadableRow | null;
	location: string;
}

/** Concurrent calls of a user's async function. They start in order, and their rows keep it. */
export const CALLS_AT_ONCE = 16;

const encoder = new TextEncoder();

/** A value from a user's code as a row's bytes, or why it is not a row. */
export function rowBytes(value: unknown): RowContent {
	if (typeof value !== "object" || value === null || Array.isArray(value)) {
		return { reason: "not a row", message: `expected an object with messages, got ${typeName(value)}` };
	}
	try {
		return encoder.encode(recordText(value));
	} catch (error) {
		return { reason: "not json", message: `cannot be written as JSON: ${messageOf(error)}` };
	}
}

function typeName(value: unknown): string {
	if (value === null) return "null";
	return Array.isArray(value) ? "an array" : typeof value;
}

/** The parsed rows of a source, in order. */
export async function* parsedRows(source: AnySource): AsyncGenerator<RawRow> {
	const decoder = new TextDecoder("utf-8", { fatal: true });
	for await (const { row, content } of rowsInOrder(source)) {
		const location = source.location(row);
		const failure = content instanceof Uint8Array ? tooLarge(content) : content;
		if (failure !== null || !(content instanceof Uint8Array)) {
			yield { value: null, failure, location };
			continue;
		}
		try {
			yield { value: JSON.parse(decoder.decode(content)), failure: null, location };
		} catch (error) {
			const message = explainRow(content, messageOf(error)) ?? messageOf(error);
			yield { value: null, failure: { reason: "not json", message }, location };
		}
	}
}

function tooLarge(bytes: Uint8Array): UnreadableRow | null {
	return bytes.length > maxRowBytes() ? rowTooLarge(bytes.length) : null;
}

/** Rows that need no conversion. */
export async function* asTheyAre(raws: AsyncIterable<RawRow>): AsyncGenerator<MadeRow> {
	for await (const { value, failure, location } of raws) yield { row: failure ?? rowBytes(value), location };
}

/** Rows converted by a user's function. `leftOut` is called for each row that it leaves out. */
export async function* convertedRows(
	raws: AsyncIterable<RawRow>,
	convert: ConvertRecordToData<unknown>,
	leftOut: () => void,
): AsyncGenerator<MadeRow> {
	const pending: { result: Promise<MadeRow[]>; location: string }[] = [];
	for await (const { value, failure, location } of raws) {
		const result = failure ? [{ row: failure, location }] : call(convert, value, location, leftOut);
		if (!(result instanceof Promise) && pending.length === 0) {
			yield* result;
			continue;
		}
		pending.push({ result: Promise.resolve(result), location });
		if (pending.length >= CALLS_AT_ONCE) yield* (await pending.shift()?.result) ?? [];
	}
	for (const { result } of pending) yield* await result;
}

/** The rows that a user's function returns for one raw row; none: it leaves the row out. */
export async function convertOne<Row>(convert: ConvertRecordToData<Row>, value: Row): Promise<RowContent[]> {
	try {
		return rowsOf(await convert(value));
	} catch (error) {
		return [failed(error)];
	}
}

function call(
	convert: ConvertRecordToData<unknown>,
	value: unknown,
	location: string,
	leftOut: () => void,
): MadeRow[] | Promise<MadeRow[]> {
	const threw = (error: unknown): MadeRow[] => [{ row: failed(error), location }];
	const made = (result: unknown): MadeRow[] => {
		const rows = rowsOf(result);
		if (rows.length === 0) leftOut();
		if (!Array.isArray(result)) return rows.map((row) => ({ row, location }));
		return rows.map((row, i) => ({ row, location: `${location} (its row ${i + 1})` }));
	};
	try {
		const result: unknown = convert(value);
		return result instanceof Promise ? result.then(made).catch(threw) : made(result);
	} catch (error) {
		return threw(error);
	}
}

function failed(error: unknown): UnreadableRow {
	// An interruption is not the row's fault.
	if (error instanceof ArlError && error.code === "ARL_INTERRUPTED") throw error;
	return { reason: "conversion failed", message: `the converting function threw: ${messageOf(error)}` };
}

function rowsOf(result: unknown): RowContent[] {
	if (result === null) return [];
	if (result === undefined) {
		return [
			{ reason: "conversion failed", message: "the converting function returned undefined; null leaves a row out" },
		];
	}
	return Array.isArray(result) ? result.map(rowBytes) : [rowBytes(result)];
}
