/**
 * Reads a JSON file: an array of rows at the top level, or one object that is a single row. The core finds the byte ranges of
 * the elements, so that they are read as raw bytes like the lines of a JSONL file.
 */
import type { FileHandle } from "node:fs/promises";
import { hashFile } from "../../disk/hash-file.js";
import { ArlError, toArlError } from "../../errors.js";
import type { Native } from "../../native.js";
import { parsed } from "./json-text.js";
import { FileRows, indexFromRanges, openHandle, openJsonl } from "./jsonl.js";
import { maxRowBytes } from "./row-size.js";
import { BOM } from "./sniff.js";

/** Rows at known byte ranges, each with the line on which it begins. */
async function fromRanges(
	handle: FileHandle,
	name: string,
	ranges: Float64Array,
	lines: Float64Array,
): Promise<FileRows> {
	const index = indexFromRanges(ranges, await hashFile(handle));
	return new FileRows(name, handle, index, (row) => `${name}:${lines[row]} (row ${row + 1})`);
}

/** Opens a file whose top level is an array. */
export async function openJsonArray(
	native: Pick<Native, "jsonArrayRows">,
	path: string,
	name = path,
): Promise<FileRows> {
	const handle = await openHandle(path);
	try {
		const { ranges, lines } = await native.jsonArrayRows(path);
		if (ranges.length === 0) {
			throw new ArlError("ARL_DATA", `${name}:1: the array has no rows`, "Each element should be a row.");
		}
		return await fromRanges(handle, name, ranges, lines);
	} catch (error) {
		await handle.close();
		const { code, message, hint } = toArlError(error);
		// The user knows a decompressed file by another name.
		throw new ArlError(code, message.replaceAll(path, name), hint, { cause: error });
	}
}

/** Opens a `.json` file that begins with an object: one row over several lines, or JSONL under another name. */
export async function openJsonObject(path: string, name = path): Promise<FileRows> {
	const handle = await openHandle(path);
	try {
		const { size } = await handle.stat();
		// A larger object would be refused as a row.
		const bytes = size <= maxRowBytes() ? await readWhole(handle, size) : Buffer.alloc(0);
		const start = bytes.subarray(0, 3).equals(BOM) ? 3 : 0;
		const text = bytes.toString("utf8", start);
		if (text.trimEnd().includes("\n") && parsed(text) !== undefined) {
			const line = text.slice(0, text.indexOf("{")).split("\n").length;
			return await fromRanges(handle, name, Float64Array.of(start, bytes.length), Float64Array.of(line));
		}
	} catch (error) {
		await handle.close();
		throw error;
	}
	await handle.close();
	return openJsonl(path, name);
}

async function readWhole(handle: FileHandle, size: number): Promise<Buffer> {
	const bytes = Buffer.alloc(size);
	for (let done = 0; done < size; ) {
		const { bytesRead } = await handle.read(bytes, done, size - done, done);
		if (bytesRead === 0) return bytes.subarray(0, done);
		done += bytesRead;
	}
	return bytes;
}
