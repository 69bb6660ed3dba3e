/**
 * `train_file` and its kin: from names to one source of rows, whatever kinds the files are of.
 * A compressed file is unpacked once into a spool file that has no name any more by the time it is read.
 */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { toArlError } from "../errors.js";
import type { Native } from "../native.js";
import { resolveFiles, sniff } from "./files.js";
import { openJsonArray, openJsonObject } from "./json.js";
import { openJsonl } from "./jsonl.js";
import { ConcatSource, type Source } from "./source.js";

/** What reading files needs of the core. */
export type FileNative = Pick<Native, "decompress" | "jsonArrayRows">;

/** Rows of several entries, and which rows are whose. */
export interface OpenedFiles {
	source: Source;
	/** Row count of each entry of `train_file`, in order: what `train_weights` refers to. */
	entryRows: number[];
	files: string[];
}

async function openPlain(native: FileNative, path: string, name: string): Promise<Source> {
	const kind = await sniff(path);
	if (kind === "array") return openJsonArray(native, path, name);
	if (kind === "object") return openJsonObject(path, name);
	return openJsonl(path, name);
}

/** One file as a source. Compression is told by content: a `.gz` that is none is read as it is. */
export async function openFile(native: FileNative, path: string, spoolDir = tmpdir()): Promise<Source> {
	const kind = await sniff(path);
	if (kind !== "gzip" && kind !== "zstd") return openPlain(native, path, path);
	const folder = await mkdtemp(join(spoolDir, "arl-rows-")).catch((error: unknown) => {
		throw toArlError(error);
	});
	try {
		const spool = join(
			folder,
			kind === "gzip"
				? path.replace(/^.*\//, "").replace(/\.gz$/i, "")
				: path.replace(/^.*\//, "").replace(/\.zst$/i, ""),
		);
		await native.decompress(path, spool);
		const source = await openPlain(native, spool, path);
		return await source;
	} finally {
		// The open handle keeps the content; a killed process leaves nothing behind.
		await rm(folder, { recursive: true, force: true });
	}
}

/** Every file that the entries name, one after the other. */
export async function openFiles(native: FileNative, entries: string[], spoolDir?: string): Promise<OpenedFiles> {
	const sources: Source[] = [];
	const entryRows: number[] = [];
	const files: string[] = [];
	try {
		for (const entry of entries) {
			let rows = 0;
			for (const file of await resolveFiles(entry)) {
				const source = await openFile(native, file, spoolDir);
				sources.push(source);
				files.push(file);
				rows += source.length;
			}
			entryRows.push(rows);
		}
	} catch (error) {
		await Promise.all(sources.map((source) => source.close()));
		throw error;
	}
	const [only] = sources;
	return { source: sources.length === 1 && only ? only : new ConcatSource(sources), entryRows, files };
}
