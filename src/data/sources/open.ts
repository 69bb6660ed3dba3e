/**
 * `train_file` and its kin: from names to one source of rows, whatever kinds the files are of.
 * A compressed file is unpacked once into a spool file that has no name any more by the time it is read.
 */
import { rm } from "node:fs/promises";
import type { Native } from "../../native.js";
import type { ColumnNames } from "./columns.js";
import { resolveFiles } from "./files.js";
import { openJsonArray, openJsonObject } from "./json.js";
import { type FileRows, openJsonl } from "./jsonl.js";
import { Remarks } from "./parquet/remarks.js";
import { withoutExtendedJson } from "./read-extended.js";
import { Scratch } from "./scratch.js";
import { type FileKind, sniff } from "./sniff.js";
import { ConcatSource, type Source } from "./source.js";

/** What reading files needs of the core. */
export type FileNative = Pick<Native, "decompress" | "unpackZstd" | "jsonArrayRows" | "sniff" | "ScratchFolder">;

/** How files are read. */
export interface FileOptions {
	/** For what is unpacked, and closed by the caller; absent: a folder in the user's cache, closed when all files are open. */
	scratch?: Scratch;
	/** Which of a folder's files are meant, by the split that they are; null: all of them. Absent: `train`. */
	split?: string | null;
	/** The option `columns`. */
	columns?: ColumnNames;
	/** Ends the reading of a file that takes long. */
	signal?: AbortSignal | null;
}

interface OneFileOptions {
	scratch: Scratch;
	columns: ColumnNames;
	signal: AbortSignal | null;
	remarks: Remarks;
	/** Gets what a user should know of single files. */
	notices: string[];
}

/** Rows of several entries, and which rows are whose. */
export interface OpenedFiles {
	source: Source;
	/** Row count of each entry of `train_file`, in order: what `train_weights` refers to. */
	entryRows: number[];
	files: string[];
	/** What a user should know of how they are read. */
	notices: string[];
}

async function openUnpacked(
	native: FileNative,
	path: string,
	name: string,
	kind: FileKind,
	options: OneFileOptions,
): Promise<Source> {
	const { scratch, columns, signal, remarks, notices } = options;
	switch (kind) {
		case "parquet": {
			const { openParquet } = await import("./parquet/read.js");
			return openParquet(path, { native, scratch, name, columns, signal, remarks });
		}
		case "csv": {
			const { openCsv } = await import("./csv.js");
			return openCsv(path, { scratch, name, columns, signal, notices });
		}
		default: {
			const source = await openJson(native, path, name, kind);
			try {
				return await withoutExtendedJson(source, options);
			} catch (error) {
				await source.close();
				throw error;
			}
		}
	}
}

function openJson(native: FileNative, path: string, name: string, kind: FileKind): Promise<FileRows> {
	if (kind === "array") return openJsonArray(native, path, name);
	return kind === "object" ? openJsonObject(path, name) : openJsonl(path, name);
}

/** One file as a source. What it is, and whether it is compressed, is told by content: a `.gz` that is none is read as it is. */
async function openFile(native: FileNative, path: string, options: OneFileOptions): Promise<Source> {
	const kind = await sniff(native, path);
	if (kind !== "gzip" && kind !== "zstd") return openUnpacked(native, path, path, kind, options);
	const unpacked = options.scratch.newFile();
	try {
		await native.decompress(path, unpacked);
		return await openUnpacked(native, unpacked, path, await sniff(native, unpacked, path), options);
	} finally {
		// The open handle keeps the content.
		await rm(unpacked, { force: true });
	}
}

/** Every file that the entries name, one after the other. */
export async function openFiles(
	native: FileNative,
	entries: readonly string[],
	options: FileOptions = {},
): Promise<OpenedFiles> {
	const sources: Source[] = [];
	const entryRows: number[] = [];
	const files: string[] = [];
	const notices: string[] = [];
	const { split = "train", columns = {}, signal = null } = options;
	const scratch = options.scratch ?? new Scratch(native);
	const remarks = new Remarks();
	let folders = 0;
	try {
		for (const entry of entries) {
			let rows = 0;
			const resolved = await resolveFiles(entry, split);
			notices.push(...resolved.notices);
			if (resolved.folder) folders += 1;
			for (const file of resolved.files) {
				const source = await openFile(native, file, { scratch, columns, signal, remarks, notices });
				sources.push(source);
				files.push(file);
				rows += source.length;
			}
			entryRows.push(rows);
		}
	} catch (error) {
		await Promise.all(sources.map((source) => source.close()));
		throw error;
	} finally {
		if (options.scratch === undefined) scratch.close();
	}
	if (folders === 0 && split !== "train" && split !== null) {
		notices.push(`split ${split} chooses nothing: files that are named are read whole, and no folder is given`);
	}
	notices.push(...remarks.lines());
	const [only] = sources;
	return { source: sources.length === 1 && only ? only : new ConcatSource(sources), entryRows, files, notices };
}
