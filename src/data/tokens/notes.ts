/**
 * Notes on rows that are trained nevertheless: each kind once, with its count and its first place. The core finds and counts
 * them; this module adds the places.
 */
import type { NativeTokenCache, RowNote } from "../../native.js";
import type { AnySource } from "../sources/source.js";

/** One kind of note, over all rows that were encoded. */
export interface NoticedRows {
	/** Stable and short: `end token only`, `parsed arguments`, `unread key`, ... */
	kind: string;
	/** What it is about, if the kind alone does not say; else empty. */
	subject: string;
	/** `warning`: the rows may train less, or something else, than their author expects. */
	level: "info" | "warning";
	/** A sentence, with the number of rows and the first place. */
	message: string;
	/** Rows in which it occurs. */
	rows: number;
	/** Occurrences in all of them. */
	count: number;
	/** Where the first of the rows is. */
	firstLocation: string;
}

/** Images that were left out of rows (`images drop`). */
export interface DroppedImages {
	images: number;
	/** Rows that they were in. */
	rows: number;
	/** Messages that consisted of nothing else and are empty now. */
	emptied: number;
}

/** The notes that {@link droppedImages} sums up. */
export function isAboutImages({ kind }: Pick<RowNote, "kind">): boolean {
	return kind === "dropped images" || kind === "emptied messages";
}

/** Sums up the notes on images that were left out. */
export function droppedImages(notes: readonly Pick<RowNote, "kind" | "rows" | "count">[]): DroppedImages {
	const dropped = { images: 0, rows: 0, emptied: 0 };
	for (const { kind, rows, count } of notes) {
		if (kind === "emptied messages") dropped.emptied += count;
		if (kind !== "dropped images") continue;
		dropped.images += count;
		dropped.rows += rows;
	}
	return dropped;
}

/** All notes on the rows of `cache` so far. */
export function noticedRows(
	cache: Pick<NativeTokenCache, "notes">,
	source: Pick<AnySource, "location">,
): NoticedRows[] {
	return cache.notes().map(({ kind, subject, level, message, rows, count, firstRow }: RowNote) => {
		const firstLocation = source.location(firstRow);
		const where = rows === 1 ? firstLocation : `${rows} rows, the first ${firstLocation}`;
		return { kind, subject, level, message: `${where}: ${message}`, rows, count, firstLocation };
	});
}

/** A note as commands print it. */
export function noteLine({ level, message }: NoticedRows): string {
	return `${level === "warning" ? "warning" : "note"}: ${message}`;
}

/** Returns each note once, and again when it has grown. */
export class NoteReport {
	private readonly reported = new Map<string, number>();

	constructor(
		private readonly cache: Pick<NativeTokenCache, "notes">,
		private readonly source: Pick<AnySource, "location">,
	) {}

	/** Images that were left out of the rows so far. */
	droppedImages(): DroppedImages {
		return droppedImages(this.cache.notes());
	}

	/** The notes that are new, or have grown, since the last call. */
	take(): NoticedRows[] {
		const fresh = noticedRows(this.cache, this.source).filter(
			({ kind, subject, rows }) => this.reported.get(`${kind}\n${subject}`) !== rows,
		);
		for (const { kind, subject, rows } of fresh) this.reported.set(`${kind}\n${subject}`, rows);
		return fresh;
	}
}
