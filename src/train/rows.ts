/**
 * Rows made ready for training: source, encoder, token cache, and filling it up to the point where the first step may come.
 */
import { createHash } from "node:crypto";
import { mkdir } from "node:fs/promises";
import { dirname } from "node:path";
import type { AgentTrainingConfig } from "../config/schema.js";
import { type Dataset, openDataset } from "../data/custom.js";
import { type OpenedFiles, openFiles } from "../data/open.js";
import { createOrder, type RowOrder } from "../data/order.js";
import { type BadRow, badRowsError, countReasons } from "../data/problems.js";
import { type AnySource, ConcatSource, type RowContent } from "../data/source.js";
import type { TokenFiller } from "../data/tokens.js";
import { ArlError, toArlError } from "../errors.js";
import type { ConvertRecordToData } from "../mongo/convert.js";
import type { Native, NativeTextEncoder, NativeTokenCache, TextInfo } from "../native.js";
import type { Resumable } from "./checkpoint.js";
import type { FillEvent, TrainEvent } from "./events.js";
import type { RowKeeper } from "./keeper.js";
import { cacheDir, checkRowsGiven } from "./options.js";
import { DATABASE_LIST } from "./state.js";

/** Rows and what makes tokens of them. */
export interface OpenRows {
	source: AnySource;
	entryRows: number[];
	encoder: NativeTextEncoder;
	text: TextInfo;
	shape: string;
	/** The first rows, as bytes. */
	firstRows: Uint8Array[];
}

const FIRST_ROWS = 32;
/** Larger ones are no help in finding out what rows look like. */
const FIRST_ROW_BYTES = 8 * 1024 * 1024;

export interface RowsInput {
	native: Native;
	args: AgentTrainingConfig;
	dataset: Dataset | null;
	/** A user's own way from a database's records to rows; null: AgentRL's. */
	convert: ConvertRecordToData | null;
	/** The run that is gone on with: its rows must come again. */
	resumed: Resumable | null;
	signal: AbortSignal | null;
}

/** What rows were opened. */
export interface RowsOpened {
	source: AnySource;
	/** Row count of each entry of `train_file`, and of the database behind them. */
	entryRows: number[];
	/** Null: the rows come from where nobody needs to be told. */
	keeper: RowKeeper | null;
}

/** Opens files, a database or a data set from code. The caller closes the source. */
export async function openRows(input: RowsInput): Promise<RowsOpened> {
	const { native, args, dataset } = input;
	checkRowsGiven(args, dataset !== null);
	if (dataset !== null) {
		const source = await openDataset(dataset);
		return { source, entryRows: [source.length], keeper: null };
	}
	const uri = args.db_connection_string;
	if (uri === null) return { ...(await openFiles(native, args.train_file)), keeper: null };
	const files = args.train_file.length > 0 ? await openFiles(native, args.train_file) : null;
	try {
		return await withDatabase(input, uri, files);
	} catch (error) {
		await files?.source.close();
		throw error;
	}
}

/** Rows of files, if there are any, and behind them those of a database. */
async function withDatabase(input: RowsInput, uri: string, files: OpenedFiles | null): Promise<RowsOpened> {
	const { args, convert, resumed, signal } = input;
	// The driver is loaded only by a run that needs it.
	const { DatabaseRun } = await import("../mongo/database.js");
	const id = resumed?.state.fixed[DATABASE_LIST];
	const folders = resumed ? [...new Set([dirname(resumed.path), args.output_dir])] : [];
	const database = await DatabaseRun.open({
		args,
		uri,
		resumed: id === undefined ? null : { id, folders },
		convert,
		signal,
	});
	const { rows } = database;
	const firstRow = files?.source.length ?? 0;
	return {
		source: files === null ? rows : new ConcatSource<RowContent>([files.source, rows]),
		entryRows: [...(files?.entryRows ?? []), rows.length],
		keeper: {
			id: database.id,
			check: (plan) => database.check(plan, firstRow),
			begin: () => database.begin(),
			commit: (plan, step) => database.commit(plan, step, firstRow),
			settled: () => database.settled(),
			release: () => database.release(),
			notices: () => database.notices(),
		},
	};
}

/** The first rows that their source can give; the others are reported with all rows. Throws where there are none. */
async function firstUsable(source: AnySource): Promise<{ places: number[]; rows: Uint8Array[] }> {
	const bad: BadRow[] = [];
	for (let first = 0; first < source.length; first += FIRST_ROWS) {
		const count = Math.min(FIRST_ROWS, source.length - first);
		const indexes = Array.from({ length: count }, (_, i) => first + i);
		const wanted = indexes.filter((row) => source.bytes(row) <= FIRST_ROW_BYTES);
		const places: number[] = [];
		const rows: Uint8Array[] = [];
		for (const [i, content] of (await source.read(wanted)).entries()) {
			const row = wanted[i] as number;
			if (content instanceof Uint8Array) {
				places.push(row);
				rows.push(content);
			} else bad.push({ row, location: source.location(row), ...content });
		}
		if (rows.length > 0 || bad.length === 0) return { places, rows };
	}
	throw badRowsError(bad, source.length);
}

/** Finds the shape of the rows. Throws with the place of the row where it is none that is known. */
export async function detectShape(
	source: AnySource,
	encoder: NativeTextEncoder,
): Promise<{ shape: string; firstRows: Uint8Array[] }> {
	const { places, rows: firstRows } = await firstUsable(source);
	try {
		return { shape: encoder.detect(firstRows), firstRows };
	} catch (error) {
		const { code, message, hint } = toArlError(error);
		if (code !== "ARL_DATA") throw error;
		// The core knows rows by their number among those it was given.
		const placed = message.replace(/\brow (\d+)\b/g, (_, row) => source.location(places[Number(row)] ?? 0));
		throw new ArlError(code, placed === message ? `${source.location(places[0] ?? 0)}: ${message}` : placed, hint);
	}
}

/** Names a cache: the same rows and the same text options have the same tokens. */
export function cacheKey(source: AnySource, text: TextInfo): string {
	return createHash("sha256")
		.update(`${source.identity}\n${source.length}\n${text.fingerprint}`)
		.digest("hex")
		.slice(0, 32);
}

/** Whether the first step must wait for all rows: what an epoch consists of is then not known before. */
export function needsAllRows(args: AgentTrainingConfig): boolean {
	return args.max_tokens_per_micro_batch !== null || args.on_bad_row === "skip" || args.truncation === "drop";
}

/** The order of training, once it is known which rows there are. */
export function orderOf(
	args: AgentTrainingConfig,
	source: AnySource,
	entryRows: number[],
	lengths: Uint32Array | null,
): RowOrder {
	return createOrder({
		rows: source.length,
		seed: args.data_seed ?? args.seed,
		strategy: args.train_sampling_strategy,
		...(lengths && { usable: (row: number) => (lengths[row] ?? 0) > 0 }),
		...(args.train_weights.length > 0 && { mixture: { rows: entryRows, weights: args.train_weights } }),
	});
}

/** Rows in the order in which they are needed from `from` on within `epoch`, then all others. */
export function fillOrder(order: RowOrder, rows: number, epoch: number, from: number): Uint32Array {
	const seen = new Uint8Array(rows);
	const wanted = new Uint32Array(rows);
	let count = 0;
	const take = (row: number) => {
		if (seen[row]) return;
		seen[row] = 1;
		wanted[count++] = row;
	};
	for (const row of order.epoch(epoch).subarray(from)) take(row);
	for (let row = 0; row < rows; row++) take(row);
	return wanted;
}

/** The cache of these rows; an earlier run's is gone on with. */
export async function openCache(
	native: Native,
	args: AgentTrainingConfig,
	source: AnySource,
	encoder: NativeTextEncoder,
	text: TextInfo,
): Promise<NativeTokenCache> {
	const folder = cacheDir(args);
	await mkdir(folder, { recursive: true }).catch((error: unknown) => {
		throw toArlError(error);
	});
	return native.TokenCache.open(folder, cacheKey(source, text), source.length, encoder);
}

/** The state of filling, as an event. */
export function fillEvent(filler: TokenFiller): FillEvent {
	return {
		type: "fill",
		...filler.counts,
		totalRows: filler.pending,
		seconds: filler.seconds,
		complete: filler.complete,
	};
}

const EVENT_MILLISECONDS = 500;

/**
 * Fills until all rows are through, or until `preprocess_seconds` are over where training may start before. Bad rows found
 * by then end the run, or are told and left out.
 */
export async function* fillFirst(
	args: AgentTrainingConfig,
	filler: TokenFiller,
	keeper: RowKeeper | null,
	signal: AbortSignal | null,
): AsyncGenerator<TrainEvent, void> {
	const started = performance.now();
	const deadline = needsAllRows(args) ? Number.POSITIVE_INFINITY : started + args.preprocess_seconds * 1000;
	filler.start();
	let told = started;
	while (!filler.complete && performance.now() < deadline) {
		let timer: NodeJS.Timeout | undefined;
		const pause = new Promise<void>((resolve) => {
			timer = setTimeout(resolve, Math.min(EVENT_MILLISECONDS, deadline - performance.now()));
		});
		await Promise.race([filler.progress(), pause]);
		clearTimeout(timer);
		for (const message of keeper?.notices() ?? []) yield { type: "notice", level: "warning", message };
		filler.check();
		if (signal?.aborted)
			throw new ArlError("ARL_INTERRUPTED", "interrupted before the first step; nothing was trained");
		if (performance.now() - told >= EVENT_MILLISECONDS) {
			told = performance.now();
			yield fillEvent(filler);
		}
	}
	filler.check();
	yield fillEvent(filler);
	if (filler.bad.length > 0) {
		if (args.on_bad_row === "error") throw filler.badRows();
		yield {
			type: "rows_skipped",
			reasons: countReasons(filler.bad),
			rows: filler.bad.map(({ location, reason, message }) => ({ location, reason, message })),
		};
	}
	if (!filler.complete) filler.failOnBadRows();
}
