/**
 * Reads every row of every source as training would, and trains nothing: bad rows, duplicates, lengths, and which rows a run
 * trains. Writes nothing.
 */
import { createHash } from "node:crypto";
import type { AgentTrainingConfig } from "../config/schema.js";
import { Scratch } from "../data/sources/scratch.js";
import type { AnySource } from "../data/sources/source.js";
import { type NoticedRows, noticedRows } from "../data/tokens/notes.js";
import type { Pictures } from "../data/tokens/pictures.js";
import { TokenPrefetcher } from "../data/tokens/prefetch.js";
import { type BadRow, countReasons } from "../data/tokens/problems.js";
import { ArlError } from "../errors.js";
import { type FetchOptions, type FetchProgress, localArgs } from "../hub/index.js";
import type { Native, NativeTokenCache, TokenBatch } from "../native.js";
import { openRows, type RowsFromCode } from "../run/setup/dataset.js";
import { type OpenedEncoder, openEncoder, picturesOf } from "../run/setup/encoder.js";
import { readModelFolder } from "../run/setup/model.js";
import { cacheDir, textOptions } from "../run/setup/options.js";
import { allRows, orderOf } from "../run/setup/plan.js";
import { checkTokenizer } from "../run/setup/preflight.js";
import { openCache } from "../run/setup/rows.js";
import { loadCode } from "../run/setup/user-modules.js";
import { checkFreeze, openVision, type Vision } from "../run/setup/vision.js";
import { ImageCounts, type ImageReport } from "./image-counts.js";
import { type LengthSummary, summarize } from "./length-summary.js";

/** A row that is longer than allowed. */
export interface OverLongRow {
	location: string;
	/** Before anything is cut off. */
	tokens: number;
}

/** Rows with the same tokens and targets. */
export interface DuplicateRows {
	/** Places of the first few. */
	locations: string[];
	rows: number;
}

/** An entry of `train_file`, the data set, or the database. */
export interface EntryReport {
	name: string;
	rows: number;
	usable: number;
	/** Rows that an epoch trains; a row that comes twice counts twice. */
	rowsPerEpoch: number;
}

/** What a check of all rows has found. */
export interface DataReport {
	shape: string;
	rows: number;
	/** Rows that a run can train. */
	usable: number;
	blankLines: number;
	/** For the user: how the rows are read. */
	notices: string[];
	/** Notes on rows that a run trains nevertheless. */
	notes: NoticedRows[];
	/** Raw rows that the converting function has left out. */
	leftOut: number;
	/** Rows that `truncation drop` leaves out, and rows that are cut. */
	dropped: number;
	truncated: number;
	entries: EntryReport[];
	reasons: Record<string, number>;
	bad: BadRow[];
	/** The most tokens that a row may have; null: no bound. */
	maxLength: number | null;
	overLong: OverLongRow[];
	/** Usable rows that equal an earlier one. */
	duplicateRows: number;
	duplicates: DuplicateRows[];
	tokens: LengthSummary;
	targetTokens: LengthSummary;
	/** Images of all rows whose images can be read; null: none are trained. */
	images: ImageReport | null;
	/** Different rows that the first epoch trains. */
	trainedRows: number;
}

export interface CheckInput {
	native: Native;
	args: AgentTrainingConfig;
	code: RowsFromCode;
	signal: AbortSignal | null;
	/** Called as a model or rows are fetched from the Hub. */
	fetching?: (progress: FetchProgress) => void;
	/** Called now and then with the number of rows checked. */
	progress?: (rows: number, of: number) => void;
}

const LOCATIONS_SHOWN = 10;

/** Checks all rows that the options name. Bad rows are reported; throws where rows cannot be read at all. */
export async function checkRows(input: CheckInput): Promise<DataReport> {
	const scratch = new Scratch(input.native, input.args.cache_dir);
	try {
		const code = await loadCode(input.args, input.code);
		const { args, notices } = await localArgs(input.args, fetchOptions(input));
		// Nothing is trained, so nothing is written back.
		const report = await check({
			...input,
			code,
			args: { ...args, cache_dir: scratch.path(), mongo_write_back: "none" },
		});
		return { ...report, notices: [...notices, ...report.notices] };
	} finally {
		scratch.close();
	}
}

/** How the model without its weights, and rows, are fetched for a look at rows. */
export function fetchOptions({ signal, fetching }: Pick<CheckInput, "signal" | "fetching">): FetchOptions {
	return { weights: false, signal, ...(fetching && { progress: fetching }) };
}

async function check(input: CheckInput): Promise<DataReport> {
	const { native, args, code, signal } = input;
	const model = await readModelFolder(args.model_name_or_path, native);
	// Every image is decoded: a fault behind its header would end a run in the middle.
	const opening = { native, options: args, model, cacheDir: cacheDir(args), signal, decodes: true };
	const vision = openVision(opening);
	checkFreeze(args, model, args.images);
	const options = textOptions(args, model.maxPositionEmbeddings, vision);
	const first = native.TextEncoder.open(options);
	checkTokenizer(model, first.info());
	const { source, entryRows, cacheFolder, notices } = await openRows({
		native,
		args,
		code,
		signal,
		datasetId: null,
		readFirst: true,
	});
	try {
		const wanted = allRows(source);
		const about = { native, textOptions: options, vision, images: args.images, source, wanted, signal };
		const opened = await openEncoder({ ...about, encoder: first });
		const { encoder, shape, loader } = opened;
		const images = new ImageCounts();
		const seen = picturesOf(native, source, loader && images.counting(loader), cacheFolder, false);
		const cache = await openCache(native, cacheFolder, source, encoder, encoder.info());
		try {
			const { bad, counts } = await fillAll(input, source, cache, seen.pictures);
			const imageReport = loader === null ? null : images.report((vision as Vision).info);
			const lengths = cache.lengths();
			for (const row of unpackable(args, source, lengths)) bad.push(row);
			bad.sort((a, b) => a.row - b.row);
			const usable = usableRows(lengths, bad);
			const maxLength = args.max_length ?? model.maxPositionEmbeddings;
			const cut = counts.truncated + counts.dropped > 0 || bad.some(({ reason }) => reason === "too long");
			return {
				shape,
				rows: source.length,
				usable: usable.length,
				blankLines: source.blankLines,
				notices,
				notes: noticedRows(cache, source),
				leftOut: source.leftOut ?? 0,
				dropped: counts.dropped,
				truncated: counts.truncated,
				reasons: countReasons(bad),
				bad,
				maxLength,
				overLong: cut && maxLength !== null ? await overLong(input, source, maxLength, opened, seen.pictures) : [],
				images: imageReport,
				...contents(source, cache, usable),
				...trained(args, source, entryRows, lengths, usable),
			};
		} finally {
			cache.close();
			await seen.close();
		}
	} finally {
		await vision?.close();
		await source.close();
	}
}

async function fillAll(input: CheckInput, source: AnySource, cache: NativeTokenCache, pictures: Pictures | null) {
	const prefetcher = new TokenPrefetcher({ source, cache, order: allRows(source), pictures });
	prefetcher.reach(Number.POSITIVE_INFINITY);
	prefetcher.start();
	while (!prefetcher.complete) {
		await prefetcher.progress();
		prefetcher.check();
		if (input.signal?.aborted) {
			await prefetcher.stop();
			throw new ArlError("ARL_INTERRUPTED", "interrupted while the rows were checked");
		}
		input.progress?.(prefetcher.counts.rows, source.length);
	}
	return { bad: [...prefetcher.bad], counts: prefetcher.counts };
}

function usableRows(lengths: Uint32Array, bad: readonly BadRow[]): Uint32Array {
	const refused = new Set(bad.map(({ row }) => row));
	return rowsWhere(lengths, (length, row) => length !== 0 && !refused.has(row));
}

/** The rows with a wanted length. */
function rowsWhere(lengths: Uint32Array, wanted: (length: number, row: number) => boolean): Uint32Array {
	const found = new Uint32Array(lengths.length);
	let count = 0;
	for (const [row, length] of lengths.entries()) if (wanted(length, row)) found[count++] = row;
	return found.slice(0, count);
}

/** Rows that do not fit into a packed micro-batch. */
function unpackable(args: AgentTrainingConfig, source: AnySource, lengths: Uint32Array): BadRow[] {
	const bound = args.max_tokens_per_micro_batch;
	if (bound === null) return [];
	return Array.from(
		rowsWhere(lengths, (length) => length > bound),
		(row) => {
			const message = `${lengths[row]} tokens; max_tokens_per_micro_batch is ${bound}`;
			return { row, location: source.location(row), reason: "fits no micro-batch", message };
		},
	);
}

/** The rows that are longer than `maxLength`; encodes all rows again, without a bound. */
async function overLong(
	input: CheckInput,
	source: AnySource,
	maxLength: number,
	{ textOptions: bounded, firstRows }: OpenedEncoder,
	pictures: Pictures | null,
): Promise<OverLongRow[]> {
	const { native, args } = input;
	const { maxLength: _, ...options } = bounded;
	const encoder = native.TextEncoder.open(options);
	encoder.detect(firstRows);
	const cache = await openCache(native, cacheDir(args), source, encoder, encoder.info());
	try {
		await fillAll(input, source, cache, pictures);
		const lengths = cache.lengths();
		return Array.from(
			rowsWhere(lengths, (length) => length > maxLength),
			(row) => ({ location: source.location(row), tokens: lengths[row] as number }),
		);
	} finally {
		cache.close();
	}
}

const ROWS_AT_ONCE = 64;

/** Lengths of the usable rows, and which of them are equal. */
function contents(source: AnySource, cache: NativeTokenCache, usable: Uint32Array) {
	const tokens = new Uint32Array(usable.length);
	const targets = new Uint32Array(usable.length);
	const seen = new Map<string, number[]>();
	for (let first = 0; first < usable.length; first += ROWS_AT_ONCE) {
		const rows = usable.subarray(first, first + ROWS_AT_ONCE);
		const batch = cache.microBatch(rows);
		for (const [i, row] of rows.entries()) {
			const [from, to] = [batch.cuSeqlens[i] as number, batch.cuSeqlens[i + 1] as number];
			tokens[first + i] = to - from;
			targets[first + i] = countTargets(batch, from, to);
			const hash = hashOf(batch, from, to, row);
			const same = seen.get(hash);
			if (same) same.push(row);
			else seen.set(hash, [row]);
		}
	}
	const groups = [...seen.values()].filter(({ length }) => length > 1);
	return {
		tokens: summarize(tokens),
		targetTokens: summarize(targets),
		duplicateRows: groups.reduce((sum, { length }) => sum + length - 1, 0),
		duplicates: groups.map((rows) => ({
			locations: rows.slice(0, LOCATIONS_SHOWN).map((row) => source.location(row)),
			rows: rows.length,
		})),
	};
}

function countTargets({ targets, weights }: TokenBatch, from: number, to: number): number {
	let count = 0;
	for (let at = from; at < to; at++) if ((targets[at] as number) >= 0 && (weights?.[at] ?? 1) > 0) count += 1;
	return count;
}

/** Hashes what is trained of a row. */
function hashOf({ inputIds, targets, weights, images }: TokenBatch, from: number, to: number, row: number): string {
	const hash = createHash("sha256").update(inputIds.subarray(from, to)).update(targets.subarray(from, to));
	if (weights?.subarray(from, to).some((weight) => weight !== 1)) hash.update(weights.subarray(from, to));
	// All images of a size have the same tokens.
	for (const image of images) if (image.index === row) hash.update(image.hash);
	return hash.digest("base64").slice(0, 24);
}

/** What the first epoch trains. */
function trained(
	args: AgentTrainingConfig,
	source: AnySource,
	entryRows: number[],
	lengths: Uint32Array,
	usable: Uint32Array,
) {
	const left = new Uint32Array(lengths.length);
	for (const row of usable) left[row] = 1;
	const epoch = usable.length === 0 ? new Uint32Array() : orderOf(args, source, entryRows, left).epoch(0);
	const hasDataset = entryRows.length > args.train_file.length + (args.db_connection_string === null ? 0 : 1);
	const names = [...args.train_file, ...(hasDataset ? ["train_dataset"] : []), "database"];
	let start = 0;
	const entries = entryRows.map((rows, i): EntryReport => {
		const [from, to] = [start, start + rows];
		start = to;
		const inside = (row: number) => row >= from && row < to;
		const count = (of: Uint32Array) => of.reduce((sum, row) => sum + (inside(row) ? 1 : 0), 0);
		return { name: names[i] ?? source.name, rows, usable: count(usable), rowsPerEpoch: count(epoch) };
	});
	return { entries, trainedRows: new Set(epoch).size };
}
