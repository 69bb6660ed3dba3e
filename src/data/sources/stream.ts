/**
 * Rows of a stream, trained in order as they come, and not stored. Their number may be known, or only how many a run needs at
 * most.
 */
import { ArlError } from "../../errors.js";
import { Cancellation, within } from "../cancellation.js";
import type { MadeRow } from "./convert.js";
import type { DatasetAbout } from "./indexed.js";
import type { LazyRows, RowContent, Source } from "./source.js";

const LOCATIONS_KEPT = 65_536;
/** How long `take` waits for a row when it has others already. */
const PATIENCE_MILLISECONDS = 20;

/** What is known about a stream in advance. */
export interface StreamAbout extends DatasetAbout {
	/** The number of rows, or, if that is open, the most that the run needs. */
	length: number;
	/** Whether the stream may have fewer or more than `length` rows. */
	open: boolean;
	/** The number of the stream's first row: earlier ones were read by an earlier part of the run. Absent: 0. */
	first?: number;
	leftOut: () => number;
}

/** The rows of a stream. */
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
	/** The number of rows when the stream ended; null: it has not ended. */
	ended: number | null = null;
	private readonly iterator: AsyncIterator<MadeRow>;
	private readonly head: MadeRow[] = [];
	/** Locations of the newest rows, in a ring buffer: only errors need them. */
	private readonly locations: string[] = [];
	/** The next row, while it is awaited. */
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
				throw new ArlError("ARL_INTERNAL", `${this.name}: row ${indexes[rows.length]} was requested out of order`);
			}
			const next = this.head.shift() ?? this.next();
			// The rows of a slow stream are used as they come.
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
		return Promise.reject(new ArlError("ARL_INTERNAL", `${this.name}: its rows can be read only in order`));
	}

	/** The next row; null: there is none. It remains the next one until `coming` is cleared. */
	private next(): Promise<MadeRow | null> {
		this.coming ??= this.ask();
		// The next caller gets the error.
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
		// Not awaited: a stream that hangs must not keep the run from ending.
		Promise.resolve(this.iterator.return?.()).catch(() => {});
	}
}
