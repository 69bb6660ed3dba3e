/**
 * Rows that come one after the other as a source: trained in their order while they come, never kept.
 * Their number may be known, or only how many a run needs at most.
 */
import { ArlError } from "../../errors.js";
import { Cancellation, within } from "../cancellation.js";
import type { MadeRow } from "./convert.js";
import type { DatasetAbout } from "./indexed.js";
import type { LazyRows, RowContent, Source } from "./source.js";

const LOCATIONS_KEPT = 65_536;
/** How long a row is waited for where others are there already. */
const PATIENCE_MILLISECONDS = 20;

/** What is known of a stream beforehand. */
export interface StreamAbout extends DatasetAbout {
	/** Rows that there are, or that the run needs at most where the end is open. */
	length: number;
	/** Whether the stream may end before, or go on after, `length` rows. */
	open: boolean;
	/** The first row that comes; those before it came to an earlier part of the run, and count. Absent: 0. */
	first?: number;
	leftOut: () => number;
}

/** Rows in their order. */
export class StreamRows implements Source<RowContent>, LazyRows {
	readonly name: string;
	readonly length: number;
	readonly blankLines = 0;
	readonly identity: string;
	readonly lazy: LazyRows = this;
	readonly inOrder = true;
	readonly recheck = true;
	readonly ahead: number;
	readonly first: number;
	/** Rows that came before the stream ended; null: it has not ended. */
	ended: number | null = null;
	private readonly iterator: AsyncIterator<MadeRow>;
	private readonly head: MadeRow[] = [];
	/** Places of the newest rows, in a ring: only errors ask for them. */
	private readonly locations: string[] = [];
	/** The row that is being waited for. */
	private coming: Promise<MadeRow | null> | null = null;
	private taken: number;
	private arrived: number;
	private readonly cancellation = new Cancellation();

	constructor(
		rows: AsyncIterable<MadeRow>,
		private readonly about: StreamAbout,
	) {
		this.name = about.name;
		this.identity = about.identity;
		this.length = about.length;
		this.ahead = about.ahead;
		this.first = about.first ?? 0;
		this.taken = this.first;
		this.arrived = this.first;
		this.iterator = rows[Symbol.asyncIterator]();
	}

	get leftOut(): number {
		return this.about.leftOut();
	}

	/** Whether the number of rows is open. */
	get open(): boolean {
		return this.about.open;
	}

	location(index: number): string {
		const known = index < this.arrived && index >= this.arrived - LOCATIONS_KEPT;
		return (known ? this.locations[index % LOCATIONS_KEPT] : undefined) ?? `${this.name}[${index}]`;
	}

	bytes(): number {
		return 0;
	}

	async take(indexes: Uint32Array, maxBytes: number): Promise<RowContent[]> {
		const rows: RowContent[] = [];
		for (let bytes = 0; rows.length < indexes.length && (rows.length === 0 || bytes < maxBytes); ) {
			if (indexes[rows.length] !== this.taken) {
				throw new ArlError("ARL_INTERNAL", `${this.name}: row ${indexes[rows.length]} was asked for out of its order`);
			}
			const next = this.head.shift() ?? this.next();
			// A slow stream's rows are used as they come.
			const made = next instanceof Promise && rows.length > 0 ? await within(next, PATIENCE_MILLISECONDS) : await next;
			if (made === null || made === undefined) break;
			this.coming = null;
			this.about.ledger?.note(this.taken, made.row, made.location);
			this.taken += 1;
			bytes += made.row instanceof Uint8Array ? made.row.length : 0;
			rows.push(made.row);
		}
		return rows;
	}

	async peek(indexes: Uint32Array): Promise<RowContent[]> {
		while (this.head.length < indexes.length) {
			const made = await this.next();
			if (made === null) break;
			this.coming = null;
			this.head.push(made);
		}
		return this.head.map(({ row }) => row);
	}

	read(): Promise<Uint8Array[]> {
		return Promise.reject(new ArlError("ARL_INTERNAL", `${this.name}: its rows can be had only in their order`));
	}

	/** The next row; null: there is none. It stays the next one until `coming` is cleared. */
	private next(): Promise<MadeRow | null> {
		this.coming ??= this.ask();
		// Whoever asks next hears of a failure.
		this.coming.catch(() => {});
		return this.coming;
	}

	private async ask(): Promise<MadeRow | null> {
		if (this.ended !== null || this.arrived === this.length) return null;
		const { done, value } = await this.cancellation.race(this.iterator.next());
		if (!done) {
			this.locations[this.arrived % LOCATIONS_KEPT] = value.location;
			this.arrived += 1;
			return value;
		}
		this.ended = this.arrived;
		if (this.arrived === 0) throw new ArlError("ARL_DATA", `${this.name}: the data set has no rows`);
		if (!this.about.open) {
			throw new ArlError(
				"ARL_DATA",
				`${this.name}: its length is ${this.length}, and it ended after ${this.arrived} rows`,
				"Correct the data set's length.",
			);
		}
		return null;
	}

	sync(): void {
		this.about.ledger?.sync();
	}

	cancel(): void {
		this.cancellation.cancel();
	}

	async close(): Promise<void> {
		this.cancel();
		this.about.ledger?.close();
		// Not awaited: a stream that hangs would not let the run end.
		Promise.resolve(this.iterator.return?.()).catch(() => {});
	}
}
