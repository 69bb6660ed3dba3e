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
	/** Bytes of row `index`, without reading it: exact for files, an estimate for a database, 0 where nothing is known. */
	bytes(index: number): number;
	/** The rows in the order asked for. */
	read(indexes: ArrayLike<number>): Promise<C[]>;
	close(): Promise<void>;
	/** Raw rows that a user's function has left out so far. */
	readonly leftOut?: number;
	/** Only of rows that come into being as they are asked for. */
	readonly lazy?: LazyRows;
}

/** How rows of code are had: one after the other, each or why it is not there. */
export interface LazyRows {
	/** Rows can only be had in their order, each once. */
	readonly inOrder: boolean;
	/** In their order they can be had from this row on only; absent: from the first. */
	readonly first?: number;
	/** Rows whose tokens are there already are asked for nevertheless: nothing else tells whether they are the same. */
	readonly recheck: boolean;
	/** Rows are made only as far ahead of training as this many; infinite: they are there already. */
	readonly ahead: number;
	/** The rows of the first of `indexes`, one at least, about as many as `maxBytes` hold. None: the rows have ended before. */
	take(indexes: Uint32Array, maxBytes: number): Promise<RowContent[]>;
	/** The rows of `indexes`, which `take` will give once more. */
	peek(indexes: Uint32Array): Promise<RowContent[]>;
	/** What was taken is known on the disk from here on, also if the machine stops. */
	sync(): void;
	/** Whoever waits for a row is told at once that none comes any more. */
	cancel(): void;
}

/** Several sources as one, in the order given. */
export class ConcatSource<C extends RowContent = Uint8Array> implements Source<C> {
	readonly name: string;
	readonly length: number;
	readonly blankLines: number;
	readonly identity: string;
	/** First row of each part, and the total behind the last. */
	readonly starts: number[] = [0];
	readonly lazy?: LazyRows;

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
		if (parts.some(({ lazy }) => lazy)) this.lazy = new LazyConcat(this);
	}

	get leftOut(): number {
		return this.parts.reduce((sum, part) => sum + (part.leftOut ?? 0), 0);
	}

	/** The part that row `index` lies in, and its number there. */
	locate(index: number): { part: Source<C>; partIndex: number; row: number } {
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

/** The first rows of `indexes` of any source, about as many as `maxBytes` hold. */
export async function takeRows(source: AnySource, indexes: Uint32Array, maxBytes: number): Promise<RowContent[]> {
	if (source.lazy) return source.lazy.take(indexes, maxBytes);
	let count = 0;
	for (let bytes = 0; count < indexes.length; count++) {
		bytes += source.bytes(indexes[count] as number);
		if (count > 0 && bytes > maxBytes) break;
	}
	return source.read(indexes.subarray(0, count));
}

/** Rows of several parts that are taken before their size is looked at. */
const TAKEN_TOGETHER = 16;

/** Rows of which some parts are made as they are asked for. */
class LazyConcat implements LazyRows {
	readonly inOrder = false;
	readonly recheck: boolean;
	readonly ahead: number;
	private readonly lazyParts: LazyRows[];

	constructor(private readonly source: ConcatSource<RowContent>) {
		this.lazyParts = source.parts.flatMap(({ lazy }) => lazy ?? []);
		this.recheck = this.lazyParts.some(({ recheck }) => recheck);
		this.ahead = Math.min(...this.lazyParts.map(({ ahead }) => ahead));
	}

	async take(indexes: Uint32Array, maxBytes: number): Promise<RowContent[]> {
		const rows: RowContent[] = [];
		let bytes = 0;
		for (let first = 0; first < indexes.length && (first === 0 || bytes < maxBytes); first += TAKEN_TOGETHER) {
			const taken = await this.all(indexes.subarray(first, first + TAKEN_TOGETHER));
			for (const row of taken) bytes += row instanceof Uint8Array ? row.length : 0;
			rows.push(...taken);
		}
		return rows;
	}

	/** All rows of `indexes`, whatever their parts. */
	private async all(indexes: Uint32Array): Promise<RowContent[]> {
		const places = Array.from(indexes, (index) => this.source.locate(index));
		const rows = new Array<RowContent>(indexes.length);
		for (const part of new Set(places.map(({ part }) => part))) {
			const at = [...places.keys()].filter((place) => places[place]?.part === part);
			const wanted = Uint32Array.from(at, (place) => places[place]?.row ?? 0);
			for (let done = 0; done < wanted.length; ) {
				const taken = await takeRows(part, wanted.subarray(done), Number.POSITIVE_INFINITY);
				for (const row of taken) rows[at[done++] as number] = row;
			}
		}
		return rows;
	}

	async peek(indexes: Uint32Array): Promise<RowContent[]> {
		return Promise.all(
			Array.from(indexes, async (index) => {
				const { part, row } = this.source.locate(index);
				const [found] = part.lazy ? await part.lazy.peek(Uint32Array.of(row)) : await part.read([row]);
				return found as RowContent;
			}),
		);
	}

	sync(): void {
		for (const lazy of this.lazyParts) lazy.sync();
	}

	cancel(): void {
		for (const lazy of this.lazyParts) lazy.cancel();
	}
}
