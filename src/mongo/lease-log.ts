/** The documents that a run has leased, in the order of their rows, and the file that logs them in the run's folder. */
import { fsyncSync } from "node:fs";
import type { FileHandle } from "node:fs/promises";
import { writeAll } from "../disk/write-all.js";
import { toArlError } from "../errors.js";
import { DocumentList, type Listed } from "./document-list.js";
import { type ListOf, lineOf, pathOf, readList, writeList } from "./list-file.js";
import type { RowCollection } from "./selection.js";

/** The type of an `_id` that stands for no document: rows that were missing in a step when no more came. */
const NONE = 0;

/** What a run has leased so far. */
export class LeaseLog implements ListOf {
	readonly documents = new DocumentList();
	/** Steps whose rows are counted as trained. */
	counted = 0;
	/** The first row of each document, and the total. */
	private readonly starts: number[] = [0];
	private file: FileHandle | null = null;
	private path = "";

	constructor(
		readonly id: string,
		readonly database: string,
		readonly collection: RowCollection,
	) {}

	/** The log of the run with this id. @throws as `readList`. */
	static async read(folders: readonly string[], listId: string): Promise<LeaseLog> {
		const { id, database, collection, documents, counted } = await readList(folders, "claims", listId);
		const log = new LeaseLog(id, database, collection);
		for (let i = 0; i < documents.length; i++) log.push(documents.at(i));
		log.counted = counted;
		return log;
	}

	/** Rows leased so far. */
	get rows(): number {
		return this.starts.at(-1) ?? 0;
	}

	/** The first row of document `index`; after the last document, the total. */
	firstRow(index: number): number {
		return this.starts[index] ?? this.rows;
	}

	/** The first document that begins at row `row` or later. */
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

	/** Whether an entry is a document, and not a placeholder for rows that never came. */
	isDocument(index: number): boolean {
		return this.documents.at(index).id.type !== NONE;
	}

	push(listed: Listed): void {
		this.documents.push(listed);
		this.starts.push(this.rows + listed.rows);
		this.append(lineOf(listed));
	}

	/** Adds a placeholder for rows that never came, in the last step of an earlier part of the run. */
	pushNone(rows: number): void {
		this.push({ id: { type: NONE, bytes: Buffer.alloc(0), at: 0, end: 0 }, rows, trainedCount: 0 });
	}

	noteCounted(step: number): void {
		if (step <= this.counted) return;
		this.counted = step;
		this.append(`counted ${step}\n`);
	}

	/** Before the first step: starts the file in the run's folder, in place of those of earlier runs. */
	async begin(folder: string): Promise<void> {
		const { counted, documents } = this;
		let written = 0;
		const lines = function* () {
			for (; written < documents.length; written++) yield lineOf(documents.at(written));
			if (counted > 0) yield `counted ${counted}\n`;
		};
		this.path = pathOf(folder, "claims", this.id);
		this.file = await writeList(folder, "claims", this, lines());
		// Documents that were leased while the file was being written.
		for (; written < documents.length; written++) this.append(lineOf(documents.at(written)));
	}

	private append(line: string): void {
		if (this.file === null) return;
		try {
			writeAll(this.file.fd, Buffer.from(line));
		} catch (error) {
			throw toArlError(error, this.path);
		}
	}

	/** Forces the log to disk, so that it survives a crash of the machine. */
	sync(): void {
		if (this.file !== null) fsyncSync(this.file.fd);
	}

	async close(): Promise<void> {
		await this.file?.close();
		this.file = null;
	}
}
