/**
 * Rows of a source cut in two by their content: which side a row is on depends on a seed and its bytes alone, not on its place.
 * So equal rows are never on both sides, and rows that are added, removed or moved change the side of no other.
 */
import { createHash } from "node:crypto";
import { type AnySource, type RowContent, rowsInOrder, type Source } from "./source.js";

/** The two sides of a cut: row numbers of the source, ascending. */
export interface Cut {
	/** Rows to train. */
	rest: Uint32Array;
	heldOut: Uint32Array;
}

/** Numbers of 48 bits, which doubles hold exactly. */
const RANGE = 2 ** 48;

/** Whether a row is held out: the first 48 bits of SHA-256 of seed and content, as a number from 0 to 1, are below `share`. */
export function isHeldOut(row: Uint8Array, share: number, seed: number): boolean {
	const digest = createHash("sha256").update(`arl eval_split ${seed}\n`).update(row).digest();
	return digest.readUIntBE(0, 6) < share * RANGE;
}

/** Reads all rows, and cuts them. A row that cannot be read stays among those to train, which report it. */
export async function cutByContent(
	source: AnySource,
	share: number,
	seed: number,
	signal: AbortSignal | null,
): Promise<Cut> {
	const rest: number[] = [];
	const heldOut: number[] = [];
	for await (const { row, content } of rowsInOrder(source)) {
		signal?.throwIfAborted();
		const out = content instanceof Uint8Array && isHeldOut(content, share, seed);
		(out ? heldOut : rest).push(row);
	}
	return { rest: Uint32Array.from(rest), heldOut: Uint32Array.from(heldOut) };
}

/** Some rows of a source as a source. `about`: what, besides the source's own identity, decides which rows they are. */
export class SubsetSource implements Source<RowContent> {
	readonly name: string;
	readonly length: number;
	readonly blankLines: number;
	readonly identity: string;

	/** `owner`: closing it closes the source. */
	constructor(
		private readonly source: AnySource,
		private readonly rows: Uint32Array,
		about: string,
		private readonly owner: boolean,
	) {
		this.name = source.name;
		this.length = rows.length;
		this.blankLines = owner ? source.blankLines : 0;
		this.identity = createHash("sha256").update(`${about}\n${source.identity}`).digest("hex");
	}

	get leftOut(): number {
		return this.owner ? (this.source.leftOut ?? 0) : 0;
	}

	location(index: number): string {
		return this.source.location(this.rows[index] as number);
	}

	bytes(index: number): number {
		return this.source.bytes(this.rows[index] as number);
	}

	read(indexes: ArrayLike<number>): Promise<RowContent[]> {
		return this.source.read(Array.from(indexes, (index) => this.rows[index] as number));
	}

	async close(): Promise<void> {
		if (this.owner) await this.source.close();
	}
}
