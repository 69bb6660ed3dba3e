/**
 * Writes a value from a user's code as JSON text. What JSON.stringify would drop silently (NaN, a Map, a function) is an error
 * with its place in the value.
 */

const MAX_DEPTH = 200;

/**
 * The value as JSON text. A bigint is written as an integer with all its digits. Throws a TypeError that begins with the place
 * (`messages[1].weight`) of a value for which JSON has no text.
 */
export function recordText(value: unknown): string {
	return text(value, [], 0) ?? "null";
}

/** The text of one value; undefined: its key is left out, as in JSON.stringify. */
function text(given: unknown, path: (string | number)[], depth: number): string | undefined {
	const value = withToJson(given, path);
	switch (typeof value) {
		case "string":
			return JSON.stringify(value);
		case "number":
			if (!Number.isFinite(value)) throw refusal(path, `${value} has no JSON text`);
			return Object.is(value, -0) ? "-0.0" : String(value);
		case "boolean":
			return String(value);
		case "bigint":
			return value.toString();
		case "undefined":
			return undefined;
		case "object":
			break;
		default:
			throw refusal(path, `a ${typeof value} has no JSON text`);
	}
	if (value === null) return "null";
	if (depth >= MAX_DEPTH)
		throw refusal(path.slice(0, 4), `it contains itself, or is nested more than ${MAX_DEPTH} levels deep`);
	return Array.isArray(value) ? listText(value, path, depth) : objectText(value, path, depth);
}

function withToJson(value: unknown, path: (string | number)[]): unknown {
	if (typeof value !== "object" || value === null || !("toJSON" in value)) return value;
	return typeof value.toJSON === "function" ? value.toJSON(String(path.at(-1) ?? "")) : value;
}

function listText(list: unknown[], path: (string | number)[], depth: number): string {
	const parts: string[] = [];
	// Not `map`, which skips the holes of an array.
	for (let i = 0; i < list.length; i++) {
		path.push(i);
		const part = text(list[i], path, depth + 1);
		if (part === undefined) throw refusal(path, "undefined has no JSON text");
		parts.push(part);
		path.pop();
	}
	return `[${parts.join(",")}]`;
}

function objectText(object: object, path: (string | number)[], depth: number): string {
	const lost =
		object instanceof Map || object instanceof Set || ArrayBuffer.isView(object) || object instanceof ArrayBuffer;
	if (lost) throw refusal(path, `a ${object.constructor.name} has no JSON text; use a plain object or array`);
	const parts: string[] = [];
	for (const [key, value] of Object.entries(object)) {
		path.push(key);
		const part = text(value, path, depth + 1);
		if (part !== undefined) parts.push(`${JSON.stringify(key)}:${part}`);
		path.pop();
	}
	return `{${parts.join(",")}}`;
}

function refusal(path: (string | number)[], why: string): TypeError {
	const place = path.map((part, i) => (typeof part === "number" ? `[${part}]` : i === 0 ? part : `.${part}`)).join("");
	return new TypeError(place === "" ? why : `${place}: ${why}`);
}
