/**
 * Data sets from code: what a user may give, and which way of reading it a run takes: by index, as a stream beside training,
 * or all of it first.
 */
import { setImmediate } from "node:timers/promises";
import { ArlError, messageOf, userError } from "../../errors.js";
import { asTheyAre, type ConvertRecordToData, convertedRows, parsedRows, type RawRow } from "./convert.js";
import { checkLength, type DatasetAbout, type Indexed, IndexedRows } from "./indexed.js";
import { materializeRows } from "./materialize.js";
import type { RecordData } from "./record.js";
import type { Scratch } from "./scratch.js";
import type { AnySource, UnreadableRow } from "./source.js";
import { StreamRows } from "./stream.js";

/** What any data set may say of itself. */
export interface DatasetInfo {
	/**
	 * Vouches for the content: data sets of the same identity have the same rows. With it tokens of earlier runs are used
	 * again; without it a resumed run asks for rows again and compares them with what it has read before.
	 */
	readonly identity?: string;
}

/** A data set with random access. */
export interface IndexedDataset<Row = RecordData> extends DatasetInfo {
	readonly length: number;
	get(index: number): Row | Promise<Row>;
}

/** Rows one after the other, each time from the first on. With `length` it need not be read to its end to be known. */
export type StreamDataset<Row = RecordData> = (Iterable<Row> | AsyncIterable<Row>) &
	DatasetInfo & { readonly length?: number };

/** What `train_dataset` may be. */
export type Dataset<Row = RecordData> = StreamDataset<Row> | IndexedDataset<Row>;

/** How a run reads rows of code. */
export interface ReadingOptions {
	/** Rows that the run needs at most (it may be infinite) where they may be trained as they come; null: all are read first. */
	streamed: number | null;
	/** Rows that are made ahead of training. */
	ahead: number;
	/** What to know rows by that lie nowhere; `replayed`: they are all read again when the run is resumed. */
	about(identity: string | null, replayed: boolean): Omit<DatasetAbout, "name" | "ahead">;
	signal: AbortSignal | null;
	/** Rows that are read first at the most. */
	most: number;
	/** Called with the rows that were read first so far. */
	progress: (rows: number) => void;
	/** For rows that are read first. */
	scratch: Scratch;
	maxSpoolBytes?: number;
}

const NAME = "train_dataset";
const ROWS_BETWEEN_PAUSES = 1024;

function isIndexed(dataset: object): dataset is Indexed & DatasetInfo {
	return "get" in dataset && typeof dataset.get === "function" && "length" in dataset;
}

function isStream(dataset: object): dataset is StreamDataset<unknown> {
	return Symbol.asyncIterator in dataset || Symbol.iterator in dataset;
}

/** Throws `ARL_CONFIG` for what is no data set. */
export function checkDataset(dataset: unknown, name = NAME): asserts dataset is Dataset<unknown> {
	if (typeof dataset === "object" && dataset !== null && (isIndexed(dataset) || isStream(dataset))) return;
	throw new ArlError(
		"ARL_CONFIG",
		`${name}: expected an iterable or async iterable of rows, or an object with length and get(i)`,
	);
}

/** Lists are read by index: they cannot be anything but what they hold. */
function indexedOf(dataset: Dataset<unknown>): (Indexed & DatasetInfo) | null {
	if (Array.isArray(dataset)) {
		return {
			get length() {
				return dataset.length;
			},
			get: (index) => dataset[index] as unknown,
		};
	}
	return isIndexed(dataset) ? dataset : null;
}

/** A property of a user's object, which may be computed there, and fail. */
function propertyOf<T extends object, K extends keyof T>(dataset: T, name: K): T[K] {
	try {
		return dataset[name];
	} catch (error) {
		throw userError(`${NAME}: its ${String(name)}`, error);
	}
}

function identityOf(dataset: DatasetInfo): string | null {
	const identity = propertyOf(dataset, "identity");
	if (identity === undefined) return null;
	if (typeof identity === "string" && identity !== "") return identity;
	throw new ArlError("ARL_CONFIG", `${NAME}: its identity should be a text that is not empty`);
}

async function* rawRows(dataset: Dataset<unknown>): AsyncGenerator<RawRow> {
	let count = 0;
	const next = (value: unknown, failure: UnreadableRow | null = null): RawRow => {
		return { value, failure, location: `${NAME}[${count++}]` };
	};
	if (isIndexed(dataset)) {
		checkLength(NAME, propertyOf(dataset, "length"));
		const rows = new IndexedRows(dataset, { name: NAME, identity: "", ledger: null, ahead: 0 });
		// One at a time: converting them has calls under way of its own.
		while (count < rows.length) {
			const { value, failure } = await rows.value(count);
			yield next(value, failure);
		}
		return;
	}
	try {
		for await (const value of dataset) {
			yield next(value);
			// Rows that are there at once would let no signal through.
			if (count % ROWS_BETWEEN_PAUSES === 0) await setImmediate();
		}
	} catch (error) {
		if (error instanceof ArlError) throw error;
		// What has thrown gives no more rows: going on without them would drop them.
		throw new ArlError("ARL_DATA", `${NAME}[${count}]: the data set threw: ${messageOf(error)}`, "", { cause: error });
	}
}

/** A data set as a source. Throws `ARL_DATA` where it has no rows, and `ARL_CONFIG` for what is no data set. */
export async function openDataset(dataset: Dataset<unknown>, options: ReadingOptions): Promise<AnySource> {
	checkDataset(dataset);
	const identity = identityOf(dataset);
	const indexed = indexedOf(dataset);
	if (indexed) {
		checkLength(NAME, propertyOf(indexed, "length"));
		return new IndexedRows(indexed, { name: NAME, ahead: options.ahead, ...options.about(identity, false) });
	}
	const rows = asTheyAre(rawRows(dataset));
	const length = "length" in dataset ? propertyOf(dataset, "length") : undefined;
	if (length !== undefined) checkLength(NAME, length);
	return openMade(rows, { name: NAME, identity, length, leftOut: () => 0 }, options);
}

interface MadeAbout {
	name: string;
	identity: string | null;
	/** Rows that there are; undefined: that is not known. */
	length: number | undefined;
	leftOut: () => number;
}

async function openMade(
	rows: ReturnType<typeof asTheyAre>,
	made: MadeAbout,
	options: ReadingOptions,
): Promise<AnySource> {
	const { streamed } = options;
	const { name, leftOut, length } = made;
	const open = length === undefined;
	const count = length ?? streamed;
	if (streamed !== null && count !== null && Number.isFinite(count)) {
		const about = { ...options.about(made.identity, true), name, ahead: options.ahead };
		return new StreamRows(rows, { ...about, length: count, open, leftOut });
	}
	return materializeRows(rows, {
		name,
		leftOut,
		signal: options.signal,
		most: options.most,
		progress: options.progress,
		scratch: options.scratch,
		...(options.maxSpoolBytes !== undefined && { maxBytes: options.maxSpoolBytes }),
	});
}

/** What a converting function is applied to: files' rows, or a data set. */
export type Convertible = { source: AnySource } | { dataset: Dataset<unknown> };

async function* allRaws(parts: readonly Convertible[]): AsyncGenerator<RawRow> {
	for (const part of parts) yield* "source" in part ? parsedRows(part.source) : rawRows(part.dataset);
}

/** The rows that a user's function makes of `parts`, one part after the other, as a source. */
export async function openConverted(
	parts: readonly Convertible[],
	convert: ConvertRecordToData<never>,
	options: ReadingOptions,
): Promise<AnySource> {
	let left = 0;
	// What rows the function takes is between its writer and the rows.
	const rows = convertedRows(allRaws(parts), convert as ConvertRecordToData<unknown>, () => {
		left += 1;
	});
	const name = parts.map((part) => ("source" in part ? part.source.name : NAME)).join(", ");
	return openMade(rows, { name, identity: null, length: undefined, leftOut: () => left }, options);
}
