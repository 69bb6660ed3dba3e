/**
 * Finds where JSON values begin and end in a text, without parsing them. Distinguishes only brackets and strings: the row's
 * parser finds whatever else is wrong with a text.
 */

import { parsed } from "./json-text.js";

const QUOTE = 0x22;
const BACKSLASH = 0x5c;

function isSpace(byte: number | undefined): boolean {
	return byte === 0x20 || byte === 0x09 || byte === 0x0a || byte === 0x0d;
}

/** The offset after white space. */
function skipSpace(bytes: Uint8Array, from: number): number {
	let at = from;
	while (at < bytes.length && isSpace(bytes[at])) at += 1;
	return at;
}

/** The offset after the string that begins at `from`; -1: it has no end. */
function stringEnd(bytes: Uint8Array, from: number): number {
	for (let at = from + 1; at < bytes.length; at++) {
		const byte = bytes[at] as number;
		if (byte === BACKSLASH) at += 1;
		else if (byte === QUOTE) return at + 1;
		else if (byte < 0x20) return -1;
	}
	return -1;
}

/** The offset after the array, object or string that begins at `from`; -1: it has no end, or is none of these. */
function nestedEnd(bytes: Uint8Array, from: number): number {
	let depth = 0;
	for (let at = from; at < bytes.length; at++) {
		const byte = bytes[at] as number;
		if (byte === QUOTE) {
			at = stringEnd(bytes, at) - 1;
			if (at < 0) return -1;
		} else if (byte === 0x5b || byte === 0x7b) {
			depth += 1;
		} else if (byte === 0x5d || byte === 0x7d) {
			depth -= 1;
		}
		if (depth <= 0) return depth === 0 ? at + 1 : -1;
	}
	return -1;
}

/** The offset after the value that begins at `from`; -1: there is none. */
function valueEnd(bytes: Uint8Array, from: number): number {
	const first = bytes[from];
	if (first === QUOTE || first === 0x5b || first === 0x7b) return nestedEnd(bytes, from);
	let at = from;
	// Numbers, true, false and null end before white space or punctuation.
	while (at < bytes.length && !isSpace(bytes[at]) && !isMark(bytes[at] as number)) at += 1;
	return at > from ? at : -1;
}

function isMark(byte: number): boolean {
	return (
		byte === 0x2c || byte === 0x3a || byte === QUOTE || byte === 0x5b || byte === 0x5d || byte === 0x7b || byte === 0x7d
	);
}

/** Whether a text is only white space. */
export function isBlankText(bytes: Uint8Array): boolean {
	return skipSpace(bytes, 0) === bytes.length;
}

/** Whether a text is exactly one array or object by its brackets; what is inside is not checked. */
export function isNestedJson(bytes: Uint8Array): boolean {
	const from = skipSpace(bytes, 0);
	if (bytes[from] !== 0x5b && bytes[from] !== 0x7b) return false;
	const end = nestedEnd(bytes, from);
	return end >= 0 && skipSpace(bytes, end) === bytes.length;
}

/** The keys of an object's text with the bytes of their values, in order; null: it is not an object. */
export function objectEntries(bytes: Uint8Array): [string, Uint8Array][] | null {
	const entries: [string, Uint8Array][] = [];
	let at = skipSpace(bytes, 0);
	if (bytes[at] !== 0x7b) return null;
	at = skipSpace(bytes, at + 1);
	if (bytes[at] === 0x7d) return skipSpace(bytes, at + 1) === bytes.length ? entries : null;
	for (;;) {
		if (bytes[at] !== QUOTE) return null;
		const keyEnd = stringEnd(bytes, at);
		if (keyEnd < 0) return null;
		const key = parsed(Buffer.from(bytes.subarray(at, keyEnd)).toString("utf8"));
		at = skipSpace(bytes, keyEnd);
		if (typeof key !== "string" || bytes[at] !== 0x3a) return null;
		at = skipSpace(bytes, at + 1);
		const end = valueEnd(bytes, at);
		if (end < 0) return null;
		entries.push([key, bytes.subarray(at, end)]);
		at = skipSpace(bytes, end);
		if (bytes[at] === 0x7d) return skipSpace(bytes, at + 1) === bytes.length ? entries : null;
		if (bytes[at] !== 0x2c) return null;
		at = skipSpace(bytes, at + 1);
	}
}
