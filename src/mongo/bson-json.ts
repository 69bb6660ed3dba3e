/**
 * Converts BSON to JSON text directly from its bytes, which keeps what JavaScript objects lose: the order of keys (also of `"2"`
 * and `"10"`), floats (`1.0`), integers beyond 2^53, null versus absent. Knows no kind of document.
 */
import { isUtf8 } from "node:buffer";
import { BSON, Decimal128 } from "mongodb";
import { dateText, floatText } from "../data/sources/json-text.js";

/** Why a document cannot be a row. */
export class DocumentProblem extends Error {
	override readonly name = "DocumentProblem";

	constructor(
		/** Short and stable, for counts of bad rows: `missing link`, `wrong type`, ... */
		readonly reason: string,
		message: string,
	) {
		super(message);
	}
}

/** A value in its bytes: `bytes[at, end)`. */
export interface BsonValue {
	readonly type: number;
	readonly bytes: Buffer;
	readonly at: number;
	readonly end: number;
}

const TYPE = {
	double: 1,
	string: 2,
	object: 3,
	array: 4,
	binary: 5,
	undefined: 6,
	objectId: 7,
	boolean: 8,
	date: 9,
	null: 10,
	regex: 11,
	dbPointer: 12,
	code: 13,
	symbol: 14,
	codeWithScope: 15,
	int: 16,
	timestamp: 17,
	long: 18,
	decimal: 19,
} as const;

const KINDS: Readonly<Record<number, string>> = {
	[TYPE.double]: "a number",
	[TYPE.string]: "a string",
	[TYPE.object]: "an object",
	[TYPE.array]: "an array",
	[TYPE.binary]: "binary data",
	[TYPE.undefined]: "undefined",
	[TYPE.objectId]: "an ObjectId",
	[TYPE.boolean]: "a boolean",
	[TYPE.date]: "a date",
	[TYPE.null]: "null",
	[TYPE.regex]: "a regular expression",
	[TYPE.dbPointer]: "a DBPointer",
	[TYPE.code]: "code",
	[TYPE.symbol]: "a symbol",
	[TYPE.codeWithScope]: "code",
	[TYPE.int]: "a number",
	[TYPE.timestamp]: "a timestamp",
	[TYPE.long]: "a number",
	[TYPE.decimal]: "a Decimal128",
};

/** MongoDB limits documents to 100 levels; deeper ones do not come from a server. */
const MAX_DEPTH = 200;

/** A whole document as a value. */
export function documentOf(bytes: Uint8Array): BsonValue {
	const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
	return { type: TYPE.object, bytes: buffer, at: 0, end: buffer.length };
}

/** The name of a value's type in messages: `a string`; `missing` if there is none. */
export function bsonKind(value: BsonValue | undefined): string {
	return value === undefined ? "missing" : (KINDS[value.type] ?? `a value of type ${value.type}`);
}

export const isObject = (value: BsonValue | undefined): value is BsonValue => value?.type === TYPE.object;
export const isArray = (value: BsonValue | undefined): value is BsonValue => value?.type === TYPE.array;
export const isString = (value: BsonValue | undefined): value is BsonValue => value?.type === TYPE.string;

/** Whether a value is absent or null. */
export function isNothing(value: BsonValue | undefined): value is undefined {
	return value === undefined || value.type === TYPE.null || value.type === TYPE.undefined;
}

function malformed(what: string): DocumentProblem {
	return new DocumentProblem("wrong bson", what);
}

function sizeOf(type: number, bytes: Buffer, at: number): number {
	switch (type) {
		case TYPE.double:
		case TYPE.date:
		case TYPE.timestamp:
		case TYPE.long:
			return 8;
		case TYPE.int:
			return 4;
		case TYPE.boolean:
			return 1;
		case TYPE.objectId:
			return 12;
		case TYPE.decimal:
			return 16;
		case TYPE.null:
		case TYPE.undefined:
		case 0x7f:
		case 0xff:
			return 0;
		case TYPE.object:
		case TYPE.array:
		case TYPE.codeWithScope:
			return bytes.readInt32LE(at);
		case TYPE.string:
		case TYPE.code:
		case TYPE.symbol:
			return bytes.readInt32LE(at) + 4;
		case TYPE.binary:
			return bytes.readInt32LE(at) + 5;
		case TYPE.dbPointer:
			return bytes.readInt32LE(at) + 16;
		case TYPE.regex:
			return bytes.indexOf(0, bytes.indexOf(0, at) + 1) + 1 - at;
		default:
			throw malformed(`a value of the unknown type ${type}`);
	}
}

/** The keys and values of a document or an array, in order. */
export function* entries(value: BsonValue): Generator<[key: string, value: BsonValue]> {
	const { bytes } = value;
	const end = value.end - 1;
	let at = value.at + 4;
	while (at < end) {
		const type = bytes[at] as number;
		const nameEnd = bytes.indexOf(0, at + 1);
		if (nameEnd < 0 || nameEnd >= end) throw malformed("a key without an end");
		const from = nameEnd + 1;
		const size = sizeOf(type, bytes, from);
		if (size < 0 || from + size > end) throw malformed("a value longer than its document");
		yield [text(bytes, at + 1, nameEnd), { type, bytes, at: from, end: from + size }];
		at = from + size;
	}
}

/** The value of a key; undefined: absent. A repeated key has its last value, as in Python. */
export function get(value: BsonValue, key: string): BsonValue | undefined {
	let found: BsonValue | undefined;
	for (const [name, inner] of entries(value)) if (name === key) found = inner;
	return found;
}

/** All fields by name. */
export function fieldsOf(value: BsonValue): Map<string, BsonValue> {
	return new Map(entries(value));
}

/** The elements of an array. */
export function itemsOf(value: BsonValue): BsonValue[] {
	return [...entries(value)].map(([, item]) => item);
}

function text(bytes: Buffer, from: number, to: number): string {
	const read = bytes.toString("utf8", from, to);
	// Only text with a replacement character can come from invalid bytes.
	if (read.includes("\uFFFD") && !isUtf8(bytes.subarray(from, to))) {
		throw new DocumentProblem("wrong encoding", `a string is not UTF-8: ${JSON.stringify(read.slice(0, 40))}`);
	}
	return read;
}

/** The text of a string value. */
export function stringOf(value: BsonValue): string {
	return text(value.bytes, value.at + 4, value.end - 1);
}

/** The number of a double or an integer; null for other values. */
export function numberOf(value: BsonValue | undefined): number | null {
	switch (value?.type) {
		case TYPE.double:
			return value.bytes.readDoubleLE(value.at);
		case TYPE.int:
			return value.bytes.readInt32LE(value.at);
		case TYPE.long:
			return Number(value.bytes.readBigInt64LE(value.at));
		default:
			return null;
	}
}

/** The value as the driver's type, for queries. */
export function driverValue(value: BsonValue): unknown {
	const document = Buffer.alloc(4 + 3 + (value.end - value.at) + 1);
	document.writeInt32LE(document.length, 0);
	document[4] = value.type;
	document.write("v", 5);
	value.bytes.copy(document, 7, value.at, value.end);
	return BSON.deserialize(document, { promoteValues: false }).v;
}

/** A key for Maps: equal only for equal values. */
export function valueKey(value: BsonValue): string {
	return `${value.type}:${value.bytes.toString("hex", value.at, value.end)}`;
}

/** A value as JSON text. */
export function bsonText(value: BsonValue, depth = 0): string {
	const { bytes, at, end } = value;
	switch (value.type) {
		case TYPE.double:
			return finite(bytes.readDoubleLE(at));
		case TYPE.int:
			return String(bytes.readInt32LE(at));
		case TYPE.long:
			return String(bytes.readBigInt64LE(at));
		case TYPE.string:
		case TYPE.symbol:
			return JSON.stringify(text(bytes, at + 4, end - 1));
		case TYPE.boolean:
			return bytes[at] === 0 ? "false" : "true";
		case TYPE.null:
			return "null";
		case TYPE.objectId:
			return `"${bytes.toString("hex", at, end)}"`;
		case TYPE.date:
			return isoDate(bytes.readBigInt64LE(at));
		case TYPE.decimal:
			return JSON.stringify(new Decimal128(bytes.subarray(at, end)).toString());
		case TYPE.binary:
			return `"${bytes.toString("base64", at + 5, end)}"`;
		case TYPE.object:
		case TYPE.array:
			if (depth > MAX_DEPTH) throw new DocumentProblem("wrong bson", `more than ${MAX_DEPTH} levels of nesting`);
			return nestedText(value, depth);
		default:
			throw new DocumentProblem("wrong type", `${bsonKind(value)} has no JSON text`);
	}
}

function nestedText(value: BsonValue, depth: number): string {
	const isList = value.type === TYPE.array;
	const parts: string[] = [];
	for (const [key, inner] of entries(value)) {
		// Old drivers wrote `undefined` for an absent key.
		if (inner.type === TYPE.undefined && !isList) continue;
		const written = inKey(isList ? `[${parts.length}]` : key, () => bsonText(inner, depth + 1));
		parts.push(isList ? written : `${JSON.stringify(key)}:${written}`);
	}
	return isList ? `[${parts.join(",")}]` : `{${parts.join(",")}}`;
}

/** Runs `action`, and adds the key to the path in its `DocumentProblem`. */
export function inKey<T>(key: string, action: () => T): T {
	try {
		return action();
	} catch (error) {
		if (!(error instanceof DocumentProblem)) throw error;
		const path = /^`([^`]*)`: (.*)$/s.exec(error.message);
		const below = path ? `${path[1]?.startsWith("[") ? "" : "."}${path[1]}` : "";
		throw new DocumentProblem(error.reason, `\`${key}${below}\`: ${path ? path[2] : error.message}`);
	}
}

function finite(value: number): string {
	if (!Number.isFinite(value)) throw new DocumentProblem("not finite", `${value} has no JSON text`);
	return floatText(value);
}

function isoDate(milliseconds: bigint): string {
	const text = dateText(Number(milliseconds));
	if (text === null) throw new DocumentProblem("wrong type", "a date outside the years that can be written");
	return `"${text}"`;
}
