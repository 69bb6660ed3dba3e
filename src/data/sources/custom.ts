/**
 * User-supplied datasets: what a user may pass, and how a run reads it: by index, as a stream during training, or completely
 * before it.
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

/** What any dataset may declare about itself. */
export interface DatasetInfo {
	/**
	 * Identifies the content: datasets with the same identity have the same rows. With it the tokens of earlier runs are reused;
	 * without it a resumed run reads rows again and compares them with those that it has read before.
	 */
	readonly identity?: string;
}

/** A dataset with random access. */
export interface IndexedDataset<Row = RecordData> extends DatasetInfo {
	readonly length: number;
	get(index: number): Row | Promise<Row>;
}

/** Rows one after the other, from the first on each time it is iterated. With `length` its size is known without reading it. */
export type StreamDataset<Row = RecordData> = (Iterable<Row> | AsyncIterable<Row>) &
	DatasetInfo & { readonly length?: number };

/** What `train_dataset` may be. */
export type Dataset<Row = RecordData> = StreamDataset<Row> | IndexedDataset<Row>;

/** How a run reads a user-supplied dataset. */
export interface ReadingOptions {
	/** The most rows that the run needs (may be infinite) if rows may be trained as they come; null: all are read first. */
	streamed: number | null;
	/** Rows that are generated ahead of training. */
	ahead: number;
	/** How to recognize the rows later; `replayed`: a resumed run reads all of them again. */
	about(identity: string | null, replayed: boolean): Omit<DatasetAbout, "name" | "ahead">;
	signal: AbortSignal | null;
	/** The most rows that are read before training. */
	most: number;
	/** Called with the number of rows read before training so far. */
	progress: (rows: number) => void;
	/** Holds the rows that are read before training. */
	scratch: Scratch;
	maxSpillBytes?: number;
}

const NAME = "train_dataset";
const ROWS_BETWEEN_PAUSES = 1024;

function isIndexed(dataset: object): dataset is Indexed & DatasetInfo {
	return "get" in dataset && typeof dataset.get === "function" && "length" in dataset;
}

function isStream(dataset: object): dataset is StreamDataset<unknown> {
	return Symbol.asyncIterator in dataset || Symbol.iterator in dataset;
}

/** Throws `ARL_CONFIG` if the value is not a dataset. */
export function checkDataset(dataset: unknown, name = NAME): asserts dataset is Dataset<unknown> {
	if (typeof dataset === "object" && dataset !== null && (isIndexed(dataset) || isStream(dataset))) return;
	throw new ArlError(
		"ARL_CONFIG",
		`${name}: expected an iterable or async iterable of rows, or an object with length and get(i)`,
	);
}

/** The dataset with random access, if it has it. Arrays are read by index. */
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

/** A property of a user's object; a getter of it may throw. */
function propertyOf<T extends object, K extends keyof T>(dataset: T, name: K): T[K] {
	try {
		return dataset[name];
	} catch (error) {
		throw userError(`${NAME}: its ${String(name)}`, error);
	}
}

function declaredIdentity(dataset: DatasetInfo): string | null {
	const identity = propertyOf(dataset, "identity");
	if (identity === undefined) return null;
	if (typeof identity === "string" && identity !== "") return identity;
	throw new ArlError("ARL_CONFIG", `${NAME}: its identity should be a non-empty string`);
}

async function* rawRows(dataset: Dataset<unknown>): AsyncGenerator<RawRow> {
	let count = 0;
	const next = (value: unknown, failure: UnreadableRow | null = null): RawRow => {
		return { value, failure, location: `${NAME}[${count++}]` };
	};
	if (isIndexed(dataset)) {
		checkLength(NAME, propertyOf(dataset, "length"));
		const rows = new IndexedRows(dataset, { name: NAME, identity: "", ledger: null, ahead: 0 });
		// One at a time: the conversion runs its own concurrent calls.
		while (count < rows.length) {
			const { value, failure } = await rows.value(count);
			yield next(value, failure);
		}
		return;
	}
	try {
		for await (const value of dataset) {
			yield next(value);
			// An iterable that never waits would let no signal through.
			if (count % ROWS_BETWEEN_PAUSES === 0) await setImmediate();
		}
	} catch (error) {
		if (error instanceof ArlError) throw error;
		// An iterable that threw yields no more rows: continuing would drop them silently.
		throw new ArlError("ARL_DATA", `${NAME}[${count}]: the data set threw: ${messageOf(error)}`, "", { cause: error });
	}
}

/** A dataset as a source. Throws `ARL_DATA` if it has no rows, and `ARL_CONFIG` if it is not a dataset. */
export async function openDataset(dataset: Dataset<unknown>, options: ReadingOptions): Promise<AnySource> {
	checkDataset(dataset);
	const identity = declaredIdentity(dataset);
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
	/** The number of rows; undefined: unknown. */
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
		...(options.maxSpillBytes !== undefined && { maxBytes: options.maxSpillBytes }),
	});
}

/** What a converting function is applied to: rows of files, or a dataset. */
export type Convertible = { source: AnySource } | { dataset: Dataset<unknown> };

async function* allRaws(parts: readonly Convertible[]): AsyncGenerator<RawRow> {
	for (const part of parts) yield* "source" in part ? parsedRows(part.source) : rawRows(part.dataset);
}

/** The rows that a user's function returns for those of `parts`, one part after the other, as a source. */
export async function openConverted(
	parts: readonly Convertible[],
	convert: ConvertRecordToData<never>,
	options: ReadingOptions,
): Promise<AnySource> {
	let left = 0;
	// The type of the rows that the function takes cannot be checked here.
	const rows = convertedRows(allRaws(parts), convert as ConvertRecordToData<unknown>, () => {
		left += 1;
	});
	const name = parts.map((part) => ("source" in part ? part.source.name : NAME)).join(", ");
	return openMade(rows, { name, identity: null, length: undefined, leftOut: () => left }, options);
}
