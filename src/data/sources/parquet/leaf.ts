/**
 * A column of values as a cursor: the level of its next entry, and the value that belongs to it. Entries of all columns of a
 * row are taken in step, which is how nested rows come out of flat columns.
 */
import type { ColumnMetaData } from "hyparquet";
import { ArlError, messageOf, toArlError } from "../../../errors.js";
import type { Unpack } from "./codecs.js";
import { type ColumnShape, PageReader, type Values } from "./pages.js";

/** Where pages come from. */
export interface OpenChunk {
	fd: number;
	chunk: ColumnMetaData;
	unpack: Unpack;
	readAhead: number;
	/** For messages: the file, and the row group counted from 0. */
	name: string;
	group: number;
}

/** One column of the file's lowest level. */
export class Leaf {
	private opened: OpenChunk | null = null;
	private pages: PageReader | null = null;
	private repetition: Int32Array | null = null;
	private definition: Int32Array | null = null;
	private values: Values | null = null;
	private count = 0;
	private at = 0;

	constructor(
		readonly path: readonly string[],
		readonly shape: ColumnShape,
	) {}

	/** Begins a row group. */
	open(opened: OpenChunk): void {
		this.opened = opened;
		this.pages = new PageReader(opened.fd, this.shape, opened.chunk, opened.unpack, opened.readAhead);
		this.count = 0;
		this.at = 0;
	}

	/** Repetition level of the next entry; 0 where the row group ends too. */
	next(): number {
		if (this.at === this.count && !this.load()) return 0;
		return this.repetition === null ? 0 : (this.repetition[this.at] as number);
	}

	/** Whether the row group has no entry more. */
	get ended(): boolean {
		return this.at === this.count && !this.load();
	}

	/** Definition level of the next entry. */
	level(): number {
		if (this.at === this.count && !this.load()) throw this.damaged(new Error("it ends before its last row"));
		return this.definition === null ? this.shape.maxDefinition : (this.definition[this.at] as number);
	}

	/** Passes over an entry that has no value. */
	skip(): void {
		this.level();
		this.at += 1;
	}

	/** The next entry's value; its level must be the highest. */
	take(): unknown {
		this.at += 1;
		try {
			return this.values?.next();
		} catch (error) {
			throw this.damaged(error);
		}
	}

	private load(): boolean {
		const { pages } = this;
		if (pages === null) return false;
		const offset = pages.offset;
		try {
			const page = pages.next();
			if (page === null) return false;
			this.repetition = page.repetition;
			this.definition = page.definition;
			this.values = page.values;
			this.count = page.count;
			this.at = 0;
			return true;
		} catch (error) {
			throw this.damaged(error, offset);
		}
	}

	/** The error of a column that cannot be read. */
	damaged(error: unknown, offset?: number): ArlError {
		if (error instanceof Error && "syscall" in error) return toArlError(error);
		const reason = messageOf(error);
		const place = offset === undefined ? "" : `, page at byte ${offset}`;
		return new ArlError(
			"ARL_DATA",
			`${this.opened?.name ?? ""}: column ${this.path.join(".")} cannot be read (row group ${this.opened?.group ?? 0}${place}, ${this.pages?.codec ?? ""}): ${reason}`,
			"The file is damaged or not complete: copy or write it again.",
			{ cause: error },
		);
	}
}
