/**
 * Explains why the core refuses a row: Python's text instead of JSON, a table written column by column, rows under a key of one
 * object. Looks only at refused rows, and returns nothing if it is not sure.
 */
import { HEADER_NAMES } from "./columns.js";
import { objectEntries } from "./json-scan.js";
import { parsed } from "./json-text.js";

const JSON_DUMPS = "write it with json.dumps";

/** Whether a text is a list, tuple or dict as Python prints it. */
function isPython(text: string): boolean {
	const value = text.trim();
	if (!/^[[({]/.test(value) && !/^array\(/.test(value)) return false;
	return /[[({,:]\s*[bru]?'/.test(value) || /[[({,:]\s*(True|False|None)\b/.test(value);
}

/** Whether a text contains numbers that JSON does not have, as Python writes them. */
function hasNotANumber(text: string): boolean {
	return /(^|[:,[])\s*-?(NaN|Infinity)\b/.test(text);
}

function pythonKind(text: string): string {
	const first = text.trim()[0];
	return first === "{" ? "a dict" : first === "(" ? "a tuple" : "a list";
}

function excerpt(text: string): string {
	const line = text.trim().replace(/\s+/g, " ");
	return line.length > 60 ? `${line.slice(0, 57)}...` : line;
}

/** What is wrong with a value whose text is not JSON; null: unknown. */
function wrongText(what: string, text: string): string | null {
	if (isPython(text)) {
		return `${what} is Python's text of ${pythonKind(text)}, not JSON: ${JSON_DUMPS} (${excerpt(text)})`;
	}
	if (hasNotANumber(text)) {
		return `${what} contains NaN or Infinity, for which JSON has no number: write null, or leave it out`;
	}
	return null;
}

function isObject(value: unknown): value is Record<string, unknown> {
	return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** For a row that is not JSON: what is wrong, and in which key. */
function notJson(bytes: Uint8Array, text: string, message: string): string | null {
	const entries = objectEntries(bytes);
	if (entries === null) return wrongText("the row", text);
	for (const [key, value] of entries) {
		const own = Buffer.from(value).toString("utf8");
		if (parsed(own) !== undefined) continue;
		return wrongText(`\`${key}\``, own) ?? `\`${key}\`: ${message}`;
	}
	return null;
}

/** For a row that is JSON and a `message` that names a key: that the key's string should be JSON. */
function nestedText(row: Record<string, unknown>, message: string): string | null {
	for (const [key, value] of Object.entries(row)) {
		if (typeof value !== "string" || !message.includes(`\`${key}\``) || parsed(value) !== undefined) continue;
		const wrong = wrongText(`\`${key}\``, value);
		if (wrong !== null) return wrong;
		if (/^\s*[[{]/.test(value)) return `\`${key}\` contains text that is not JSON (${excerpt(value)}): ${JSON_DUMPS}`;
	}
	return null;
}

function isNumbered(value: unknown): boolean {
	if (!isObject(value)) return false;
	const keys = Object.keys(value);
	return keys.length > 0 && keys.every((key, i) => key === String(i));
}

/** Whether a value looks like a row, and not like a message of a conversation. */
function looksLikeRow(value: unknown): boolean {
	if (!isObject(value) || "role" in value || "from" in value) return false;
	return Object.keys(value).some((key) => HEADER_NAMES.has(key));
}

/** For a row that contains many rows: how to write them. */
function manyRows(row: Record<string, unknown>): string | null {
	const entries = Object.entries(row);
	if (entries.length > 0 && entries.every(([, value]) => isNumbered(value))) {
		const names = entries.map(([key]) => key).join(", ");
		return `one object that contains a table column by column (${names}), as pandas writes it; write one row per line: to_json(path, orient="records", lines=True)`;
	}
	if (entries.some(([key]) => HEADER_NAMES.has(key))) return null;
	const lists = entries.filter(([, value]) => Array.isArray(value) && value.length > 0 && value.every(looksLikeRow));
	const [only] = lists;
	if (lists.length !== 1 || only === undefined) return null;
	const [key, list] = only as [string, unknown[]];
	const many = list.length === 1 ? "the one item" : `the ${list.length} items`;
	return `one object, whose rows are ${many} of its key \`${key}\`; write only that list into a file`;
}

/** A better message for a refused row than `message`; null: there is none. */
export function explainRow(bytes: Uint8Array, message: string): string | null {
	const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("utf8");
	const row = parsed(text);
	if (row === undefined) return notJson(bytes, text, message);
	if (!isObject(row)) return null;
	return (
		nestedText(row, message) ?? (/\b(no known shape|not an array|no messages)\b/.test(message) ? manyRows(row) : null)
	);
}
