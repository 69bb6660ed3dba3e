/**
 * A JSON file as rows: an array of rows at its top level, or one object that is a single row.
 * The core finds where the elements lie, so that they cross as raw bytes like the lines of a JSONL file.
 */
import { createHash } from "node:crypto";
import { closeSync, createReadStream, openSync, readSync } from "node:fs";
import { type FileHandle, open, readFile, stat } from "node:fs/promises";
import { ArlError, toArlError } from "../errors.js";
import type { Native } from "../native.js";
import { FileRows, indexFromRanges, openJsonl } from "./jsonl.js";
import type { Source } from "./source.js";

/** A single object above this size is not read to find out whether it is one. */
const MAX_OBJECT_BYTES = 64 * 1024 * 1024;

async function hashFile(path: string): Promise<string> {
	const hash = createHash("sha256");
	for await (const chunk of createReadStream(path, { highWaterMark: 4 * 1024 * 1024 })) hash.update(chunk as Buffer);
	return hash.digest("hex");
}

/** Line of byte `offset`, counted from 1. Reads the file again: only errors ask for it. */
function lineOf(path: string, offset: number): number {
	const file = openSync(path, "r");
	try {
		const buffer = Buffer.allocUnsafe(1024 * 1024);
		let line = 1;
		for (let at = 0; at < offset; ) {
			const read = readSync(file, buffer, 0, Math.min(buffer.length, offset - at), at);
			if (read === 0) break;
			const chunk = buffer.subarray(0, read);
			for (let i = chunk.indexOf(10); i >= 0; i = chunk.indexOf(10, i + 1)) line += 1;
			at += read;
		}
		return line;
	} finally {
		closeSync(file);
	}
}

async function fromRanges(path: string, name: string, ranges: Float64Array): Promise<Source> {
	const identity = await hashFile(path);
	const handle: FileHandle = await open(path, "r").catch((error: unknown) => {
		throw toArlError(error);
	});
	return new FileRows(name, handle, indexFromRanges(ranges, identity), (row, { starts }) => {
		return `${name}:${lineOf(path, starts.at(row))} (row ${row + 1})`;
	});
}

/** A file whose top level is an array. */
export async function openJsonArray(native: Pick<Native, "jsonArrayRows">, path: string, name = path): Promise<Source> {
	let ranges: Float64Array;
	try {
		ranges = native.jsonArrayRows(path);
	} catch (error) {
		const { code, message, hint } = toArlError(error);
		// A file that was unpacked is known to its user by another name.
		throw new ArlError(code, message.replaceAll(path, name), hint);
	}
	if (ranges.length === 0)
		throw new ArlError("ARL_DATA", `${name}:1: the array has no rows`, "Each element should be a row.");
	return fromRanges(path, name, ranges);
}

/** A `.json` file that begins with an object: one row over several lines, or JSONL by another name. */
export async function openJsonObject(path: string, name = path): Promise<Source> {
	const { size } = await stat(path);
	if (size <= MAX_OBJECT_BYTES) {
		const bytes = await readFile(path);
		const text = bytes.toString("utf8").replace(/^\uFEFF/, "");
		if (text.trimEnd().includes("\n") && isJson(text)) {
			return fromRanges(path, name, Float64Array.of(text.length < bytes.toString("utf8").length ? 3 : 0, bytes.length));
		}
	}
	return openJsonl(path, name);
}

/** Whether a text is JSON, as JavaScript reads it. */
export function isJson(text: string): boolean {
	try {
		JSON.parse(text);
		return true;
	} catch {
		return false;
	}
}
