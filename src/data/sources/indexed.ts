/**
 * Rows of `{ length, get(i) }`: fetched one by one, in the order and at the time that training needs them.
 */
import { ArlError, messageOf } from "../../errors.js";
import { Cancellation } from "../cancellation.js";
import type { RowHashes } from "../tokens/row-hashes.js";
import { CALLS_AT_ONCE, rowBytes } from "./convert.js";
import type { LazyRows, RowContent, Source, UnreadableRow } from "./source.js";

/** A dataset with random access. */
export interface Indexed {
	readonly length: number;
	get(index: number): unknown;
}

/** What is known about a dataset besides its rows. */
export interface DatasetAbout {
	name: string;
	identity: string;
	/** Null: the dataset has declared an identity. */
	ledger: Pick<RowHashes, "note" | "sync" | "close"> | null;
	ahead: number;
}

/** Throws if a length is not a positive integer. */
export function checkLength(name: string, length: unknown): void {
	if (typeof length !== "number" || !Number.isSafeInteger(length) || length < 0) {
		throw new ArlError(
			"ARL_CONFIG",
			`${name}: its length is ${String(length)}, and should be an integer`,
			"Rows without an end are an iterable without length: set max_steps and train_sampling_strategy sequential.",
		);
	}
	if (length === 0) throw new ArlError("ARL_DATA", `${name}: the data set has no rows`);
}

/** The rows of a dataset with random access. */
export class IndexedRows implements Source<RowContent>, LazyRows {
	readonly name: string;
	readonly length: number;
	readonly blankLines = 0;
	readonly identity: string;
	readonly lazy: LazyRows = this;
	readonly inOrder = false;
	readonly recheck: boolean;
	readonly ahead: number;
	private readonly kept = new Map<number, RowContent>();
	private readonly cancellation = new Cancellation();

	constructor(
		private readonly dataset: Indexed,
		private readonly about: DatasetAbout,
	) {
		const { length } = dataset;
		this.name = about.name;
		this.identity = about.identity;
		this.recheck = about.ledger !== null;
		this.ahead = about.ahead;
		this.length = length;
	}

	location(index: number): string {
		return `${this.name}[${index}]`;
	}

	bytes(): number {
		return 0;
	}

	async take(indexes: Uint32Array, maxBytes: number): Promise<RowContent[]> {
		const rows: RowContent[] = [];
		let bytes = 0;
		for (let first = 0; first < indexes.length && (first === 0 || bytes < maxBytes); first += CALLS_AT_ONCE) {
			const asked = indexes.subarray(first, first + CALLS_AT_ONCE);
			// All calls start in this order before any is awaited.
			const calls = Array.from(asked, (index) => this.kept.get(index) ?? this.call(index));
			const taken = await this.cancellation.race(Promise.all(calls));
			this.checkLength();
			for (const [i, index] of asked.entries()) {
				const row = taken[i] as RowContent;
				this.kept.delete(index);
				this.about.ledger?.note(index, row, this.location(index));
				bytes += row instanceof Uint8Array ? row.length : 0;
				rows.push(row);
			}
		}
		return rows;
	}

	async peek(indexes: Uint32Array): Promise<RowContent[]> {
		const rows = await this.take(indexes, Number.POSITIVE_INFINITY);
		for (const [i, index] of indexes.entries()) this.kept.set(index, rows[i] as RowContent);
		return rows;
	}

	read(indexes: ArrayLike<number>): Promise<RowContent[]> {
		return this.take(Uint32Array.from(indexes), Number.POSITIVE_INFINITY);
	}

	private async call(index: number): Promise<RowContent> {
		const { value, failure } = await this.value(index);
		return failure ?? rowBytes(value);
	}

	/** What the dataset returns, or why it returns nothing. */
	async value(index: number): Promise<{ value: unknown; failure: UnreadableRow | null }> {
		try {
			const value = await this.dataset.get(index);
			if (value !== undefined) return { value, failure: null };
			const message = `get(${index}) returned undefined, and the data set's length is ${this.length}`;
			return { value, failure: { reason: "not a row", message } };
		} catch (error) {
			return {
				value: null,
				failure: { reason: "conversion failed", message: `get(${index}) threw: ${messageOf(error)}` },
			};
		}
	}

	private checkLength(): void {
		if (this.dataset.length === this.length) return;
		throw new ArlError(
			"ARL_DATA",
			`${this.name}: its length was ${this.length} and is ${this.dataset.length} now`,
			"A data set must stay the same while a run uses it.",
		);
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
	}
}
