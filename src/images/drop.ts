/**
 * Rows without their image parts, for models that read text only (`images: drop`): a source over a source. What is left of a
 * row keeps every byte; a list of parts stays a list, whose texts the core joins in the order in which they stand.
 */
import { createHash } from "node:crypto";
import { isJson } from "../data/json.js";
import type { RowContent, RowMaking, Source } from "../data/source.js";
import { contentLists, mayHoldImages, type Range, replaceRanges } from "./parts.js";

/** What was left out of the rows that were read so far. */
export interface DroppedImages {
	/** Image parts. */
	images: number;
	/** Rows that they were in. */
	rows: number;
	/** Messages that consisted of nothing else and are empty now. */
	emptied: number;
}

const IMAGE_TYPES: ReadonlySet<string> = new Set(["image_url", "image"]);

/** A row's text without its image parts; the very same bytes where it has none. */
export function withoutImages(
	row: Uint8Array,
	columns: Readonly<Record<string, string>> = {},
): { row: Uint8Array; images: number; emptied: number } {
	if (!mayHoldImages(row)) return { row, images: 0, emptied: 0 };
	const cuts: { range: Range; by: null }[] = [];
	let emptied = 0;
	const text = Buffer.from(row.buffer, row.byteOffset, row.byteLength);
	for (const parts of contentLists(row, columns)) {
		const before = cuts.length;
		let kept = 0;
		for (const [i, { type, range }] of parts.entries()) {
			if (type === null || !IMAGE_TYPES.has(type)) {
				kept += 1;
				continue;
			}
			// What is no JSON must not become a good row by losing its fault.
			if (!isJson(text.toString("utf8", range.start, range.end))) return { row, images: 0, emptied: 0 };
			// With the comma before it, or, where nothing before it stays, with the one behind it.
			const start = kept > 0 ? (parts[i - 1]?.range.end ?? range.start) : range.start;
			const end = kept > 0 ? range.end : (parts[i + 1]?.range.start ?? range.end);
			cuts.push({ range: { start, end }, by: null });
		}
		if (kept === 0 && cuts.length > before) emptied += 1;
	}
	if (cuts.length === 0) return { row, images: 0, emptied: 0 };
	return { row: replaceRanges(row, cuts), images: cuts.length, emptied };
}

/** A source whose rows have no image parts. */
export class TextOnlySource<C extends RowContent = RowContent> implements Source<C | Uint8Array> {
	readonly name: string;
	readonly length: number;
	readonly blankLines: number;
	readonly identity: string;
	readonly making?: RowMaking;
	/** What was left out of the rows that were read so far, each counted once however often it is read. */
	readonly dropped: DroppedImages = { images: 0, rows: 0, emptied: 0 };
	private readonly counted: Uint8Array;

	constructor(
		readonly inner: Source<C>,
		private readonly columns: Readonly<Record<string, string>> = {},
	) {
		this.name = inner.name;
		this.length = inner.length;
		this.blankLines = inner.blankLines;
		this.identity = createHash("sha256").update(`images dropped\n${inner.identity}`).digest("hex");
		this.counted = new Uint8Array(inner.length);
		const { making } = inner;
		if (making) {
			this.making = {
				inOrder: making.inOrder,
				first: making.first ?? 0,
				recheck: making.recheck,
				ahead: making.ahead,
				take: async (indexes, maxBytes) => this.texts(indexes, await making.take(indexes, maxBytes)),
				peek: async (indexes) => this.texts(indexes, await making.peek(indexes)),
				sync: () => making.sync(),
				cancel: () => making.cancel(),
			};
		}
	}

	get leftOut(): number {
		return this.inner.leftOut ?? 0;
	}

	location(index: number): string {
		return this.inner.location(index);
	}

	bytes(index: number): number {
		return this.inner.bytes(index);
	}

	async read(indexes: ArrayLike<number>): Promise<(C | Uint8Array)[]> {
		return this.texts(indexes, await this.inner.read(indexes));
	}

	/** What is left of the rows of the first of `indexes`. */
	private texts<R extends RowContent>(indexes: ArrayLike<number>, rows: R[]): (R | Uint8Array)[] {
		return rows.map((row, i) => {
			if (!(row instanceof Uint8Array)) return row;
			const index = indexes[i] as number;
			const { row: text, images, emptied } = withoutImages(row, this.columns);
			if (images > 0 && this.counted[index] === 0) {
				this.counted[index] = 1;
				this.dropped.images += images;
				this.dropped.rows += 1;
				this.dropped.emptied += emptied;
			}
			return text;
		});
	}

	close(): Promise<void> {
		return this.inner.close();
	}
}
