/**
 * The documents that a run has claimed, in the order of their rows, and the file of them in the run's folder: it grows as they
 * are claimed, and is on the disk for certain when a checkpoint is.
 */
import { closeSync, fsyncSync, openSync } from "node:fs";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { makeFolder } from "../disk/folders.js";
import { writeAll } from "../disk/write-all.js";
import { writeWhole } from "../disk/write-whole.js";
import { ArlError, toArlError } from "../errors.js";
import { FOLDER } from "./folder.js";
import type { RowCollection } from "./selection.js";
import { DocumentList, type Listed, lineOf, listedIn, removeOtherLists, type Snapshot } from "./snapshot.js";

/** The type of an `_id` that is none: rows that a step had too few of, when nothing came any more. */
const NONE = 0;

/** What a run has claimed so far. */
export class ClaimList implements Snapshot {
	readonly documents = new DocumentList();
	/** Steps whose rows count as trained for certain. */
	counted = 0;
	/** First row of each document, and the total. */
	private readonly starts: number[] = [0];
	private file: number | null = null;
	private path = "";

	constructor(
		readonly id: string,
		readonly database: string,
		readonly collection: RowCollection,
	) {}

	/** Rows claimed so far. */
	get rows(): number {
		return this.starts.at(-1) ?? 0;
	}

	/** First row of document `index`; of the one behind the last, the total. */
	firstRow(index: number): number {
		return this.starts[index] ?? this.rows;
	}

	/** The first document that begins at row `row` or behind it. */
	firstFrom(row: number): number {
		let low = 0;
		let high = this.documents.length;
		while (low < high) {
			const middle = (low + high) >> 1;
			if ((this.starts[middle] as number) < row) low = middle + 1;
			else high = middle;
		}
		return low;
	}

	/** The document that row `row` comes from. */
	documentOf(row: number): number {
		return this.firstFrom(row + 1) - 1;
	}

	/** False: a place that no document has. */
	isThere(document: number): boolean {
		return this.documents.at(document).id.type !== NONE;
	}

	push(listed: Listed): void {
		this.documents.push(listed);
		this.starts.push(this.rows + listed.rows);
		this.write(lineOf(listed));
	}

	/** Rows that never came, in the last step of an earlier part of the run. */
	pushNone(rows: number): void {
		this.push({ id: { type: NONE, bytes: Buffer.alloc(0), at: 0, end: 0 }, rows, trainedCount: 0 });
	}

	noteCounted(step: number): void {
		if (step <= this.counted) return;
		this.counted = step;
		this.write(`counted ${step}\n`);
	}

	/** Before the first step: the list is kept from now on, in place of those of earlier runs. */
	async begin(folder: string): Promise<void> {
		const place = join(folder, FOLDER);
		const name = `${this.id}.claims`;
		try {
			await makeFolder(place);
			this.path = join(place, name);
			await writeWhole(this.path, async (partial) => {
				this.file = openSync(partial, "w");
				const { id, database, collection, documents } = this;
				let text = `${JSON.stringify({ version: 1, id, database, collection })}\n`;
				for (let i = 0; i < documents.length; i++) text += lineOf(documents.at(i));
				if (this.counted > 0) text += `counted ${this.counted}\n`;
				this.write(text);
			});
			await removeOtherLists(place, name);
		} catch (error) {
			throw toArlError(error);
		}
	}

	private write(text: string): void {
		if (this.file === null) return;
		try {
			writeAll(this.file, Buffer.from(text));
		} catch (error) {
			throw toArlError(error, this.path);
		}
	}

	/** What was claimed is on the disk from here on, also if the machine stops. */
	sync(): void {
		if (this.file !== null) fsyncSync(this.file);
	}

	close(): void {
		if (this.file !== null) closeSync(this.file);
		this.file = null;
	}
}

/** Ids of the lists that lie in a run's folder. */
export async function claimListsIn(folder: string): Promise<string[]> {
	const names = await readdir(join(folder, FOLDER)).catch(() => []);
	return names.flatMap((name) => /^([0-9a-f]+)\.claims$/.exec(name)?.[1] ?? []);
}

/**
 * The list of the run with this id, from the first of `folders` that has it.
 *
 * @throws ArlError `ARL_STATE` where none has, or the file is damaged.
 */
export async function readClaimList(folders: readonly string[], id: string): Promise<ClaimList> {
	const paths = folders.map((folder) => join(folder, FOLDER, `${id}.claims`));
	for (const path of paths) {
		const text = await readFile(path, "utf8").catch((error: NodeJS.ErrnoException) => {
			if (error.code === "ENOENT") return null;
			throw toArlError(error);
		});
		if (text === null) continue;
		// A line that has no end was being written when the machine stopped.
		const [header = "", ...lines] = text.slice(0, text.lastIndexOf("\n")).split("\n");
		const list = listOf(header, id);
		if (list === null || !lines.every((line) => read(list, line))) {
			throw new ArlError(
				"ARL_STATE",
				`${path}: the list of what this run has claimed is damaged`,
				"Copy it back, or start from scratch with another output_dir.",
			);
		}
		return list;
	}
	throw new ArlError(
		"ARL_STATE",
		`the list of what this run has claimed is missing: ${paths.join(", nor ")}`,
		"It is stored next to the checkpoints of a run that follows a database. A run that began without follow resumes without it.",
	);
}

function listOf(header: string, id: string): ClaimList | null {
	try {
		const { version, database, collection } = JSON.parse(header);
		return version === 1 ? new ClaimList(id, database, collection) : null;
	} catch {
		return null;
	}
}

function read(list: ClaimList, line: string): boolean {
	const counted = /^counted (\d+)$/.exec(line)?.[1];
	if (counted !== undefined) list.noteCounted(Number(counted));
	else if (/^\d+ (?:[0-9a-f]{2})* \d+ \d+$/.test(line)) list.push(listedIn(line));
	else return false;
	return true;
}
