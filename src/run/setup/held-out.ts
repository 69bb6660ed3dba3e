/** Opens the held-out rows of a run: each of its sources, encoded whole, and cut into micro-batches. */
import { rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { evalSources, namesHeldOut } from "../../config/eval-sources.js";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { within } from "../../data/cancellation.js";
import { epochBatches, StepPlan } from "../../data/sampler/batches.js";
import { Data } from "../../data/sampler/data.js";
import { createOrder } from "../../data/sampler/order.js";
import type { AnySource } from "../../data/sources/source.js";
import type { Pictures } from "../../data/tokens/pictures.js";
import { TokenPrefetcher } from "../../data/tokens/prefetch.js";
import { countReasons } from "../../data/tokens/problems.js";
import { ArlError } from "../../errors.js";
import { notice, type TrainEvent } from "../../events.js";
import type { Native, NativeTokenCache, TextOptions } from "../../native.js";
import type { EvalPart, HeldOut } from "../eval/evaluate.js";
import { openRows, type RowsFromCode } from "./dataset.js";
import { openEncoder, picturesOf } from "./encoder.js";
import { type BatchSize, cacheDir, mostImages } from "./options.js";
import { allRows, checkFits } from "./plan.js";
import type { Resources } from "./resources.js";
import { noteEvents, openCache } from "./rows.js";
import type { Vision } from "./vision.js";

export interface HeldOutInput {
	native: Native;
	start: { args: AgentTrainingConfig; textOptions: TextOptions; vision: Vision | null };
	code: RowsFromCode;
	/** Rows that `eval_split` has cut off those that are trained. */
	cut: AnySource | null;
	signal: AbortSignal | null;
	resources: Resources;
}

/** The names of the sources that a data set from code and a database are. */
const FROM_CODE = "dataset";
const DATABASE = "database";

/** Whether the run has held-out rows. */
export function hasHeldOut(args: AgentTrainingConfig, code: RowsFromCode): boolean {
	return namesHeldOut(args) || (code.evalDataset ?? null) !== null;
}

/** Throws `ARL_CONFIG` where rows are to be evaluated and none are given. */
export function checkHeldOutGiven(args: AgentTrainingConfig, code: RowsFromCode): void {
	if (hasHeldOut(args, code) || (args.eval_strategy === "no" && !args.eval_on_start)) return;
	const option = args.eval_strategy === "no" ? "eval_on_start" : `eval_strategy ${args.eval_strategy}`;
	throw new ArlError("ARL_CONFIG", `${option}: no held-out rows are given`, "For example --eval_file heldout.jsonl");
}

/** Opens and encodes the held-out rows. Null: there are none. */
export async function* openHeldOut(input: HeldOutInput): AsyncGenerator<TrainEvent, HeldOut | null> {
	const { native, start, code, signal, resources } = input;
	if (!hasHeldOut(start.args, code)) return null;
	const args = await heldOutArgs(start.args);
	const { source, parts, cacheFolder, notices } = await openSource(input, args);
	for (const message of notices) yield notice("info", message);
	if (source.length === 0) throw new ArlError("ARL_DATA", `${source.name}: no held-out rows`);
	// The held-out rows may have another shape than those that are trained.
	const wanted = allRows(source);
	const { textOptions: options, vision } = start;
	const about = { native, textOptions: options, vision, images: args.images, source, wanted, signal };
	const { encoder, textOptions, shape, images, loader, imageHint } = await openEncoder(about);
	const cache = await openCache(native, cacheFolder, source, encoder, encoder.info());
	resources.add(() => cache.close());
	const { pictures, close } = picturesOf(native, source, loader, cacheFolder, false);
	resources.add(close);
	const prefetcher = new TokenPrefetcher({ source, cache, order: wanted, pictures, imageHint });
	resources.add(() => prefetcher.stop());
	yield* encode(prefetcher, args, signal);
	const lengths = cache.lengths();
	checkFits(args, source, lengths);
	pictures?.lookThrough(
		cache,
		wanted.filter((row) => (lengths[row] ?? 0) > 0),
	);
	const order = createOrder({
		rows: source.length,
		seed: 0,
		strategy: "sequential",
		usable: (row) => (lengths[row] ?? 0) > 0,
	});
	if (order.rowsPerEpoch === 0) throw new ArlError("ARL_DATA", `${source.name}: no held-out row is left to evaluate`);
	const batches = epochBatches(order, 0, batchOptions(args, cache));
	const plan = new StepPlan(() => batches, { maxSteps: 0, numTrainEpochs: 1, gradientAccumulationSteps: 1 }, true);
	const found = `${order.rowsPerEpoch} rows of ${shape} in ${source.name}`;
	yield { type: "check", name: "held-out rows", message: found };
	const end = { samplesOfStep: 1, once: true, planFor: () => ({ order, plan }) };
	return {
		data: new Data(source, shape, cache, prefetcher, { order, plan }, end, pictures),
		parts,
		size: largest(plan, lengths, pictures),
		textOptions,
		images,
		vision: loader === null ? null : vision,
	};
}

/** The options of a run over the held-out rows: how they are read and encoded is as in training. */
async function heldOutArgs(args: AgentTrainingConfig): Promise<AgentTrainingConfig> {
	const { eval_split: split } = args;
	const ofSplit = typeof split === "string";
	return {
		...args,
		eval_file: ofSplit ? await folders(args.train_file) : args.eval_file,
		// Without a split all files of a folder are held out.
		split: ofSplit ? split : null,
		eval_split: null,
		train_weights: [],
		train_caps: [],
		db_connection_string: ofSplit ? args.db_connection_string : null,
		// Documents are evaluated however often they were trained, and nothing is written back.
		max_trained_count: Number.MAX_SAFE_INTEGER,
		retrained_interval: 1,
		mongo_write_back: "none",
		follow: false,
		max_steps: -1,
		cache_dir: join(cacheDir(args), "eval"),
	};
}

/** Those entries that are folders: only they have splits. */
async function folders(entries: readonly string[]): Promise<string[]> {
	const kinds = await Promise.all(entries.map((entry) => stat(entry).catch(() => null)));
	return entries.filter((_, i) => kinds[i]?.isDirectory());
}

/** The rows, and what closes with the run. */
async function openSource({ native, code, cut, signal, resources }: HeldOutInput, args: AgentTrainingConfig) {
	if (cut !== null) {
		const parts = [{ name: "rows", first: 0, end: cut.length }];
		return { source: cut, parts, cacheFolder: cacheDir(args), notices: [] };
	}
	const dataset = code.evalDataset ?? null;
	const sources = evalSources(args.eval_file);
	if (sources.length === 0 && dataset === null && args.db_connection_string === null) {
		throw new ArlError(
			"ARL_CONFIG",
			`eval_split ${args.split}: neither a folder nor a database is given, and files have no splits`,
			"Give the held-out rows with --eval_file, or a part of all rows, for example --eval_split 0.02.",
		);
	}
	const input = { native, args: { ...args, train_file: sources.map(({ path }) => path) }, signal, datasetId: null };
	const opened = await openRows({ ...input, code: { ...code, dataset }, readFirst: true });
	resources.add(() => opened.source.close());
	resources.add(() => opened.hooks?.end());
	const { source, entryRows, datasetId, cacheFolder, notices } = opened;
	// Nothing finds the tokens of a data set without an identity again.
	if (datasetId !== null) resources.add(() => rm(cacheFolder, { recursive: true, force: true }));
	const names = [...sources.map(({ name }) => name), ...(dataset === null ? [] : [FROM_CODE]), DATABASE];
	return { source, parts: partsOf(names, entryRows), cacheFolder, notices };
}

/** Encodes all rows. Throws for bad ones, or reports that they are left out. */
async function* encode(
	prefetcher: TokenPrefetcher,
	args: Pick<AgentTrainingConfig, "on_bad_row">,
	signal: AbortSignal | null,
): AsyncGenerator<TrainEvent, void> {
	prefetcher.reach(Number.POSITIVE_INFINITY);
	prefetcher.start();
	while (!prefetcher.complete) {
		await within(prefetcher.progress(), 500);
		prefetcher.check();
		if (signal?.aborted)
			throw new ArlError("ARL_INTERRUPTED", "interrupted before the first step; nothing was trained");
	}
	prefetcher.check();
	yield* noteEvents(prefetcher, true);
	const { bad } = prefetcher;
	if (bad.length === 0) return;
	if (args.on_bad_row === "error") throw prefetcher.badRows();
	yield {
		type: "rows_skipped",
		reasons: countReasons(bad),
		rows: bad.map(({ location, reason, message }) => ({ location, reason, message })),
	};
}

function batchOptions(args: AgentTrainingConfig, cache: NativeTokenCache) {
	const maxTokens = args.max_tokens_per_micro_batch;
	const packed = { maxTokens: maxTokens ?? 0, pack: (rows: Uint32Array, bound: number) => cache.pack(rows, bound) };
	return { batchSize: args.per_device_eval_batch_size, ...(maxTokens !== null && { packed }) };
}

/** The parts by their names. Folders of one name, which only `eval_split` can have, are one part. */
function partsOf(names: readonly string[], entryRows: readonly number[]): EvalPart[] {
	let first = 0;
	const parts = entryRows.map((rows, i) => {
		const part = { name: names[i] ?? "rows", first, end: first + rows };
		first = part.end;
		return part;
	});
	const distinct = new Set(parts.map(({ name }) => name)).size === parts.length;
	return distinct ? parts : [{ name: "rows", first: 0, end: first }];
}

function largest(plan: StepPlan, lengths: Uint32Array, pictures: Pictures | null): BatchSize {
	const size = { maxTokens: 1, maxSequences: 1 };
	const most = { maxPatches: 0, maxImages: 0 };
	for (let step = 0; step < plan.totalSteps; step++) {
		for (const rows of plan.rows(step)) {
			const tokens = rows.reduce((sum, row) => sum + (lengths[row] ?? 0), 0);
			size.maxTokens = Math.max(size.maxTokens, tokens);
			size.maxSequences = Math.max(size.maxSequences, rows.length);
			const { images, patches } = pictures?.sizeOf(rows) ?? { images: 0, patches: 0 };
			most.maxPatches = Math.max(most.maxPatches, patches);
			most.maxImages = Math.max(most.maxImages, images);
		}
	}
	return { ...size, ...mostImages([most]) };
}
