/**
 * Opens the files of `train_file` and similar options as one source of rows, whatever their formats.
 * A compressed file is decompressed once into a temporary file, whose name is removed once it is open.
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

/** What reading files needs from the core. */
export type FileNative = Pick<Native, "decompress" | "jsonArrayRows" | "sniff" | "ParquetReader" | "ScratchFolder">;

/** How files are read. */
export interface FileOptions {
	/** Holds temporary files, and is closed by the caller; absent: a folder in the user's cache, closed when all files are open. */
	scratch?: Scratch;
	/** Which split of a folder's files to read; null: all files. Absent: `train`. */
	split?: string | null;
	/** The option `columns`. */
	columns?: ColumnNames;
	/** Aborts the reading of a large file. */
	signal?: AbortSignal | null;
}

interface OneFileOptions {
	scratch: Scratch;
	columns: ColumnNames;
	signal: AbortSignal | null;
	remarks: Remarks;
	/** Collects what a user should know about single files. */
	notices: string[];
}

/** The rows of several entries, and how many come from each. */
export interface OpenedFiles {
	source: Source;
	/** Rows of each entry of `train_file`, in order: what `train_weights` refers to. */
	entryRows: number[];
	files: string[];
	/** What a user should know about how they are read. */
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

/** Opens one file. Its content determines its format and compression: a `.gz` file that is not gzip is read as it is. */
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

/** Opens every file that the entries name, one after the other. */
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
		notices.push(`split ${split} chooses nothing: named files are read whole, and no folder is given`);
	}
	notices.push(...remarks.lines());
	const [only] = sources;
	return { source: sources.length === 1 && only ? only : new ConcatSource(sources), entryRows, files, notices };
}
