/**
 * What every place that rows come from looks like to the rest: a fixed count of rows as raw bytes, read by index.
 * Rows are never parsed here, so that `1.0` stays `1.0`, absent keys stay absent and the order of keys holds.
 */
import { createHash } from "node:crypto";

/** A row that its source cannot give, and why; it is reported like one that cannot be encoded. */
export interface UnreadableRow {
	/** Stable and short: `missing link`, `deleted`, ... */
	reason: string;
	message: string;
}

/** A row as its source gives it. */
export type RowContent = Uint8Array | UnreadableRow;

/** Rows of whatever kind of source. */
export type AnySource = Source<RowContent>;

/** A finite set of rows. `C`: what a row may be; a file has the bytes of each. */
export interface Source<C extends RowContent = Uint8Array> {
	/** For people: a file name, or `train_dataset`. */
	readonly name: string;
	readonly length: number;
	/** Lines that hold nothing but white space and are no rows. */
	readonly blankLines: number;
	/** Changes whenever any byte of any row does: a hash over the content. Not its name, not its age. */
	readonly identity: string;
	/** Where a person finds row `index`: `train.jsonl:17`. */
	location(index: number): string;
	/** Bytes of row `index`, without reading it: exact for files, an estimate for a database. */
	bytes(index: number): number;
	/** The rows in the order asked for. */
	read(indexes: ArrayLike<number>): Promise<C[]>;
	close(): Promise<void>;
}

/** Several sources as one, in the order given. */
export class ConcatSource<C extends RowContent = Uint8Array> implements Source<C> {
	readonly name: string;
	readonly length: number;
	readonly blankLines: number;
	readonly identity: string;
	/** First row of each part, and the total behind the last. */
	readonly starts: number[] = [0];

	constructor(readonly parts: Source<C>[]) {
		const hash = createHash("sha256");
		let total = 0;
		for (const part of parts) {
			total += part.length;
			this.starts.push(total);
			hash.update(`${part.length}:${part.identity}\n`);
		}
		this.name = parts.length <= 3 ? parts.map((p) => p.name).join(", ") : `${parts.length} files`;
		this.length = total;
		this.blankLines = parts.reduce((sum, part) => sum + part.blankLines, 0);
		this.identity = hash.digest("hex");
	}

	private locate(index: number): { part: Source<C>; partIndex: number; row: number } {
		let low = 0;
		let high = this.parts.length - 1;
		while (low < high) {
			const middle = (low + high + 1) >> 1;
			if ((this.starts[middle] as number) <= index) low = middle;
			else high = middle - 1;
		}
		return { part: this.parts[low] as Source<C>, partIndex: low, row: index - (this.starts[low] as number) };
	}

	location(index: number): string {
		const { part, row } = this.locate(index);
		return part.location(row);
	}

	bytes(index: number): number {
		const { part, row } = this.locate(index);
		return part.bytes(row);
	}

	async read(indexes: ArrayLike<number>): Promise<C[]> {
		const byPart = new Map<number, { rows: number[]; places: number[] }>();
		for (let place = 0; place < indexes.length; place++) {
			const { partIndex, row } = this.locate(indexes[place] as number);
			const group = byPart.get(partIndex) ?? { rows: [], places: [] };
			group.rows.push(row);
			group.places.push(place);
			byPart.set(partIndex, group);
		}
		const rows = new Array<C>(indexes.length);
		await Promise.all(
			[...byPart].map(async ([partIndex, group]) => {
				const read = await (this.parts[partIndex] as Source<C>).read(group.rows);
				for (const [at, place] of group.places.entries()) rows[place] = read[at] as C;
			}),
		);
		return rows;
	}

	async close(): Promise<void> {
		await Promise.all(this.parts.map((part) => part.close()));
	}
}
