/**
 * The interface of every source of rows: a fixed number of rows as raw bytes, read by index. Sources never parse rows, so that
 * `1.0` stays `1.0`, absent keys stay absent and keys keep their order.
 */
import { createHash } from "node:crypto";

/** Why a source cannot read a row; reported like a row that cannot be encoded. */
export interface UnreadableRow {
	/** Stable and short: `missing link`, `deleted`, ... */
	reason: string;
	message: string;
}

/** A row as its source reads it. */
export type RowContent = Uint8Array | UnreadableRow;

/** A source of any kind. */
export type AnySource = Source<RowContent>;

/** A finite list of rows. `C`: what a row may be; files have the bytes of each row. */
export interface Source<C extends RowContent = Uint8Array> {
	/** For people: a file name, or `train_dataset`. */
	readonly name: string;
	readonly length: number;
	/** Lines of white space only, which are not rows. */
	readonly blankLines: number;
	/** A hash over the content: changes whenever any byte of any row does, and not with names or dates. */
	readonly identity: string;
	/** Where a user finds row `index`: `train.jsonl:17`. */
	location(index: number): string;
	/** Size of row `index`, without reading it: exact for files, an estimate for a database, 0 if unknown. */
	bytes(index: number): number;
	/** Reads rows, in the order of `indexes`. */
	read(indexes: ArrayLike<number>): Promise<C[]>;
	close(): Promise<void>;
	/** Raw rows that a user's function has left out so far. */
	readonly leftOut?: number;
	/** Only for rows that are generated on demand. */
	readonly lazy?: LazyRows;
}

/** Access to rows that are generated on demand; each call returns rows or the reasons why they cannot be read. */
export interface LazyRows {
	/** Whether rows can be read only in order, each once. */
	readonly inOrder: boolean;
	/** The first row that can be read, if they are in order; absent: 0. */
	readonly first?: number;
	/** Whether rows are generated again although their tokens are cached: only so can a run tell that they are the same. */
	readonly recheck: boolean;
	/** The most rows that are generated ahead of training. */
	readonly ahead: number;
	/** Generates the first rows of `indexes`: at least one, and about `maxBytes` of them. None: the rows have ended. */
	take(indexes: Uint32Array, maxBytes: number): Promise<RowContent[]>;
	/** Generates the rows of `indexes`, which `take` will return again. */
	peek(indexes: Uint32Array): Promise<RowContent[]>;
	/** Forces the record of the rows taken so far to disk, so that it survives a crash of the machine. */
	sync(): void;
	/** Rejects every wait for a row at once, and from now on. */
	cancel(): void;
}

/** Several sources as one, in the given order. */
export class ConcatSource<C extends RowContent = Uint8Array> implements Source<C> {
	readonly name: string;
	readonly length: number;
	readonly blankLines: number;
	readonly identity: string;
	/** The first row of each part, and the total at the end. */
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

	/** The part that contains row `index`, and the row's number in it. */
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

/** Reads the first rows of `indexes` from any source: at least one, and about `maxBytes` of them. */
export async function takeRows(source: AnySource, indexes: Uint32Array, maxBytes: number): Promise<RowContent[]> {
	if (source.lazy) return source.lazy.take(indexes, maxBytes);
	let count = 0;
	for (let bytes = 0; count < indexes.length; count++) {
		bytes += source.bytes(indexes[count] as number);
		if (count > 0 && bytes > maxBytes) break;
	}
	return source.read(indexes.subarray(0, count));
}

const READ_ROWS = 256;
const READ_BYTES = 8 * 1024 * 1024;

/** All rows of a source in order, except those of `skip`, read in batches. */
export async function* rowsInOrder<C extends RowContent>(
	source: Source<C>,
	skip: ReadonlySet<number> = new Set(),
): AsyncGenerator<{ row: number; content: C }> {
	for (let next = 0; next < source.length; ) {
		const indexes: number[] = [];
		for (; next < source.length && indexes.length < READ_ROWS; next++) if (!skip.has(next)) indexes.push(next);
		for (let done = 0; done < indexes.length; ) {
			const contents = await takeRows(source, Uint32Array.from(indexes.slice(done)), READ_BYTES);
			// A stream has ended.
			if (contents.length === 0) return;
			for (const content of contents) yield { row: indexes[done++] as number, content: content as C };
		}
	}
}

/** Rows that are taken from several parts before their size is checked. */
const TAKEN_TOGETHER = 16;

/** Rows of several parts, some of which are generated on demand. */
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

	/** All rows of `indexes`, of any part. */
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
