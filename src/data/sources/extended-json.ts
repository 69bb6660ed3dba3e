/**
 * MongoDB's Extended JSON, as mongoexport writes it: BSON values as objects with one key, `{"$numberInt": "3"}`. Recognizes such
 * rows, and converts them into plain values that are written like rows of a database.
 */
import { dateText, floatText } from "./json-text.js";
import { type JsonObject, type JsonValue, NumberText, type PlainValue } from "./json-value.js";

/** Why a value cannot be converted; `place`: where it is in the row. */
export class ExtendedJsonProblem extends Error {
	constructor(
		readonly place: string,
		message: string,
	) {
		super(message);
	}
}

const LONG = { min: -(2n ** 63n), max: 2n ** 63n - 1n };
const INT = { min: -(2n ** 31n), max: 2n ** 31n - 1n };

/** Converts the content of a wrapper; null: it is malformed. */
type Read = (value: JsonValue) => PlainValue | null;

function integer({ min, max }: { min: bigint; max: bigint }): Read {
	return (value) => {
		if (typeof value !== "string" || !/^-?\d+$/.test(value)) return null;
		const number = BigInt(value);
		return number >= min && number <= max ? number : null;
	};
}

const double: Read = (value) => {
	// JSON has no such numbers: the row's parser refuses them.
	if (value === "NaN" || value === "Infinity" || value === "-Infinity") return new NumberText(value);
	if (typeof value !== "string" || !/^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/.test(value)) return null;
	const number = Number(value);
	return Number.isFinite(number) ? new NumberText(floatText(number)) : null;
};

const date: Read = (value) => {
	const nested = value instanceof Map && value.size === 1 ? value.get("$numberLong") : undefined;
	const milliseconds = nested === undefined ? value : integer(LONG)(nested);
	if (typeof milliseconds === "bigint") return dateText(Number(milliseconds));
	return typeof milliseconds === "string" ? dateText(Date.parse(milliseconds)) : null;
};

const binary: Read = (value) => {
	if (!(value instanceof Map)) return null;
	const bytes = value.get("base64");
	return typeof bytes === "string" && typeof value.get("subType") === "string" && value.size === 2 ? bytes : null;
};

const uuid: Read = (value) => {
	if (typeof value !== "string" || !/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(value)) return null;
	// The same value as `$binary` with the subtype of UUIDs.
	return Buffer.from(value.replaceAll("-", ""), "hex").toString("base64");
};

const string: Read = (value) => (typeof value === "string" ? value : null);

const timestamp: Read = (value) => {
	const isTimestamp = value instanceof Map && value.size === 2 && value.has("t") && value.has("i");
	return isTimestamp ? value : null;
};

const regularExpression: Read = (value) => {
	if (!(value instanceof Map)) return null;
	const [pattern, options] = [value.get("pattern"), value.get("options")];
	return typeof pattern === "string" && typeof options === "string" ? `/${pattern}/${options}` : null;
};

/** The wrappers by their key. */
const WRAPPERS: Readonly<Record<string, Read>> = {
	$numberInt: integer(INT),
	$numberLong: integer(LONG),
	$numberDouble: double,
	$numberDecimal: (value) =>
		typeof value === "string" && /^[-+]?[\d.]+([eE][-+]?\d+)?$|^-?(NaN|Infinity)$/.test(value) ? value : null,
	$oid: (value) => (typeof value === "string" && /^[0-9a-f]{24}$/i.test(value) ? value.toLowerCase() : null),
	$date: date,
	$binary: binary,
	$uuid: uuid,
	$symbol: string,
	$code: string,
	$timestamp: timestamp,
	$regularExpression: regularExpression,
	$undefined: (value) => (value === true ? undefined : null),
};

/** An object as a wrapper: its key, content and converter; null: it is not a wrapper. */
function wrapperOf(object: JsonObject): { key: string; value: JsonValue; read: Read } | null {
	const [first] = object;
	if (first === undefined) return null;
	const [key, value] = first;
	// `{"$binary": "...", "$type": "00"}`, as old versions write it.
	if (object.size === 2 && key === "$binary" && typeof object.get("$type") === "string") {
		return { key, value, read: string };
	}
	const read = object.size === 1 && Object.hasOwn(WRAPPERS, key) ? WRAPPERS[key] : undefined;
	return read === undefined ? null : { key, value, read };
}

/** Whether only the canonical form, which wraps every number, has this wrapper. */
function isCanonical(key: string, value: JsonValue): boolean {
	return key === "$numberInt" || (key === "$numberDouble" && typeof value === "string" && /\d/.test(value));
}

/** Keys below which a row may contain anything, even what looks like Extended JSON: the arguments of a tool call. */
const FREE = new Set(["arguments"]);

/** The evidence in a row for its form: the place of the first value of each sort; null: there is none. */
export interface RowKind {
	/** `_id` of a document. */
	id: string | null;
	/** A number of BSON. */
	number: string | null;
	/** A number as only the canonical form writes it. */
	canonical: string | null;
	/** A number as the canonical form never writes it. */
	plain: string | null;
}

/** Examines a row. */
export function kindOfRow(row: JsonValue): RowKind {
	const kind: RowKind = { id: null, number: null, canonical: null, plain: null };
	if (!(row instanceof Map)) return kind;
	const id = row.get("_id");
	if (id instanceof Map && wrapperOf(id) !== null) kind.id = "_id";
	look(row, "", false, kind);
	return kind;
}

/** Whether a row by itself shows that it is Extended JSON. */
export function isExtended({ id, number }: RowKind): boolean {
	return id !== null || number !== null;
}

function look(value: JsonValue, place: string, free: boolean, kind: RowKind): void {
	if (typeof value === "bigint" || typeof value === "number") kind.plain ??= place;
	else if (Array.isArray(value)) for (const [i, item] of value.entries()) look(item, `${place}[${i}]`, free, kind);
	else if (value instanceof Map) {
		const wrapper = wrapperOf(value);
		if (wrapper !== null) {
			if (free) return;
			if (wrapper.key.startsWith("$number")) kind.number ??= place;
			if (isCanonical(wrapper.key, wrapper.value)) kind.canonical ??= place;
			return;
		}
		for (const [key, item] of value) look(item, below(place, key), free || FREE.has(key), kind);
	}
}

function below(place: string, key: string): string {
	return place === "" ? key : `${place}.${key}`;
}

/** Converts Extended JSON. What only looks like it (`$ref`, `$defs`) stays. Throws `ExtendedJsonProblem`. */
export function plainValue(value: JsonValue, place = ""): PlainValue {
	if (Array.isArray(value)) {
		return value.map((item, i) => {
			const plain = plainValue(item, `${place}[${i}]`);
			if (plain === undefined) throw new ExtendedJsonProblem(`${place}[${i}]`, "undefined has no JSON text");
			return plain;
		});
	}
	if (!(value instanceof Map)) return value;
	const wrapper = wrapperOf(value);
	if (wrapper === null) {
		const plain = new Map<string, PlainValue>();
		for (const [key, item] of value) {
			const inner = plainValue(item, below(place, key));
			if (inner !== undefined) plain.set(key, inner);
		}
		return plain;
	}
	const read = wrapper.read(wrapper.value);
	if (read === null) throw new ExtendedJsonProblem(place, `not a valid ${wrapper.key} of Extended JSON`);
	return read instanceof Map ? plainValue(read as JsonValue, place) : read;
}
