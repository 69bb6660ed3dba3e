/**
 * The files of documents in a run's folder: a header, then a line per document. The list of a run's documents (`.ids`) is
 * written once; the log of its leases (`.claims`) also grows while the run takes rows. Does not load the driver.
 */
import { type FileHandle, open, readdir, rm } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { parsed } from "../data/sources/json-text.js";
import { makeFolder } from "../disk/folders.js";
import { PARTIAL, writeWhole } from "../disk/write-whole.js";
import { ArlError, toArlError } from "../errors.js";
import { DocumentList, type Listed } from "./document-list.js";
import type { RowCollection } from "./selection.js";

/** The folder in `output_dir` for these files. */
export const LISTS_FOLDER = ".arl-rows";

/** The two kinds of files, by their extension. */
export type ListKind = "ids" | "claims";

const FLUSH_CHARACTERS = 1 << 20;

const ABOUT: Readonly<Record<ListKind, { what: string; missing: string }>> = {
	ids: {
		what: "the list of this run's documents",
		missing:
			"It is stored next to the checkpoints; without it the same rows cannot be found again. Copy it back, or start from scratch with another output_dir and the checkpoint as model_name_or_path.",
	},
	claims: {
		what: "the log of this run's leases",
		missing:
			"It is stored next to the checkpoints of a run that follows a database. A run that began without follow resumes without it.",
	},
};

/** Where a run's list is. */
export function pathOf(folder: string, kind: ListKind, id: string): string {
	return join(folder, LISTS_FOLDER, `${id}.${kind}`);
}

/** What a list is a list of. */
export interface ListOf {
	/** Of the run that created it: random, and part of the rows' identity. */
	id: string;
	/** Database within its server. */
	database: string;
	collection: RowCollection;
}

/** A list as its file holds it. */
export interface StoredList extends ListOf {
	documents: DocumentList;
	/** In a log: steps whose rows are counted as trained. */
	counted: number;
}

/** The line of a document. */
export function lineOf({ id, rows, trainedCount }: Listed): string {
	return `${id.type} ${id.bytes.toString("hex", id.at, id.end)} ${rows} ${trainedCount}\n`;
}

/**
 * Writes a list whole, in place of those of earlier runs in this folder, and leaves its file open for more lines. `length`: the
 * number of documents, if no more are appended.
 */
export async function writeList(
	folder: string,
	kind: ListKind,
	{ id, database, collection }: ListOf,
	lines: Iterable<string>,
	length?: number,
): Promise<FileHandle> {
	const path = pathOf(folder, kind, id);
	let file: FileHandle | undefined;
	try {
		await makeFolder(dirname(path));
		const written = await writeWhole(path, async (partial) => {
			file = await open(partial, "w");
			let pending = `${JSON.stringify({ version: 1, id, database, collection, documents: length })}\n`;
			for (const line of lines) {
				pending += line;
				if (pending.length < FLUSH_CHARACTERS) continue;
				await file.appendFile(pending);
				pending = "";
			}
			await file.appendFile(pending);
			return file;
		});
		for (const name of await readdir(dirname(path))) {
			const isOther = /\.(ids|claims)$/.test(basename(name, PARTIAL)) && name !== basename(path);
			if (isOther) await rm(join(dirname(path), name), { force: true });
		}
		return written;
	} catch (error) {
		await file?.close();
		throw toArlError(error);
	}
}

/** Ids of the lists in a run's folder. */
export async function listsIn(folder: string, kind: ListKind): Promise<string[]> {
	const names = await readdir(join(folder, LISTS_FOLDER)).catch(() => []);
	return names
		.filter((name) => /^[0-9a-f]+\./.test(name) && name.endsWith(`.${kind}`))
		.map((name) => basename(name, `.${kind}`));
}

/**
 * Reads the list with this id from the first of `folders` that has it.
 *
 * @throws ArlError `ARL_STATE` if none has it, or if it is damaged.
 */
export async function readList(folders: readonly string[], kind: ListKind, id: string): Promise<StoredList> {
	const paths = folders.map((folder) => pathOf(folder, kind, id));
	const { what, missing } = ABOUT[kind];
	for (const path of paths) {
		const handle = await open(path).catch((error: NodeJS.ErrnoException) => {
			if (error.code === "ENOENT") return null;
			throw toArlError(error);
		});
		if (handle === null) continue;
		try {
			const list = await parse(handle);
			if (list !== null) return list;
		} catch (error) {
			throw toArlError(error, path);
		} finally {
			await handle.close();
		}
		throw new ArlError(
			"ARL_STATE",
			`${path}: ${what} is damaged`,
			"Copy it back, or start from scratch with another output_dir.",
		);
	}
	throw new ArlError("ARL_STATE", `${what} is missing: ${paths.join(", nor ")}`, missing);
}

/** The content of a file; null: it is damaged. */
async function parse(handle: FileHandle): Promise<StoredList | null> {
	let list: StoredList | null = null;
	let length: unknown;
	let rest = "";
	for await (const chunk of handle.createReadStream({ encoding: "utf8", autoClose: false })) {
		const lines = (rest + chunk).split("\n");
		// A line without an end was being appended when the machine stopped.
		rest = lines.pop() ?? "";
		for (const line of lines) {
			if (list !== null) {
				if (!readLine(list, line)) return null;
				continue;
			}
			const header = parsed(line) as (ListOf & { version: number; documents?: number }) | undefined;
			if (header?.version !== 1) return null;
			const { id, database, collection } = header;
			length = header.documents;
			list = { id, database, collection, documents: new DocumentList(), counted: 0 };
		}
	}
	return length === undefined || list?.documents.length === length ? list : null;
}

/** Adds a line to a list; false: it is damaged. */
function readLine(list: StoredList, line: string): boolean {
	const counted = /^counted (\d+)$/.exec(line)?.[1];
	const document = /^(\d+) ((?:[0-9a-f]{2})*) (\d+) (\d+)$/.exec(line);
	if (counted !== undefined) list.counted = Math.max(list.counted, Number(counted));
	else if (document !== null) {
		const [, type, hex = "", rows, count] = document;
		const bytes = Buffer.from(hex, "hex");
		const id = { type: Number(type), bytes, at: 0, end: bytes.length };
		list.documents.push({ id, rows: Number(rows), trainedCount: Number(count) });
	}
	return counted !== undefined || document !== null;
}
