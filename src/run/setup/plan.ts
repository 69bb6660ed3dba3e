/** Plans a run from its options and rows: order, steps, rows to encode, the largest micro-batch, the number of checkpoints. */
import type { AgentTrainingConfig } from "../../config/schema.js";
import { epochBatches, StepPlan } from "../../data/sampler/batches.js";
import type { Data, Planned } from "../../data/sampler/data.js";
import { createOrder, type RowOrder } from "../../data/sampler/order.js";
import type { AnySource } from "../../data/sources/source.js";
import { ArlError } from "../../errors.js";
import type { NativeTokenCache } from "../../native.js";
import { type BatchSize, microBatchesOfStep, mostImages, stepInterval } from "./options.js";

/** Whether the first step must wait for all rows: what an epoch consists of depends on each of them. */
export function needsAllRows(args: AgentTrainingConfig): boolean {
	return args.max_tokens_per_micro_batch !== null || args.on_bad_row === "skip" || args.truncation === "drop";
}

/** The order of training. `lengths`: tokens of each row, 0 where it cannot be used; null: all rows can. */
export function orderOf(
	args: AgentTrainingConfig,
	source: Pick<AnySource, "length">,
	entryRows: number[],
	lengths: Uint32Array | null,
): RowOrder {
	return createOrder({
		rows: source.length,
		seed: args.data_seed ?? args.seed,
		strategy: args.train_sampling_strategy,
		...(lengths && { usable: (row: number) => (lengths[row] ?? 0) > 0 }),
		...(args.train_weights.length > 0 && { mixture: { rows: entryRows, weights: args.train_weights } }),
		...(args.train_caps.length > 0 && { caps: { rows: entryRows, caps: args.train_caps } }),
	});
}

/** Order and steps before any row is encoded. Null: they depend on all rows. */
export function planEarly(args: AgentTrainingConfig, source: AnySource, entryRows: number[]): Planned | null {
	if (needsAllRows(args)) return null;
	const order = orderOf(args, source, entryRows, null);
	return { order, plan: createPlan(args, order, null) };
}

/** Order and steps by what the cache has of each row. Throws `ARL_DATA` where no row is left, or one does not fit. */
export function planEncoded(
	args: AgentTrainingConfig,
	source: AnySource,
	entryRows: number[],
	cache: NativeTokenCache,
	early: Planned | null,
): Planned {
	const lengths = cache.lengths();
	const order = early?.order ?? orderOf(args, source, entryRows, lengths);
	if (order.rowsPerEpoch === 0) {
		throw new ArlError(
			"ARL_DATA",
			`${source.name}: no row is left to train on`,
			"Check which rows were left out, and why.",
		);
	}
	checkFits(args, source, lengths);
	return early ?? { order, plan: createPlan(args, order, cache) };
}

/** Order and steps of a stream that has ended after `rows` rows. */
export function planStream(args: AgentTrainingConfig, rows: number, cache: NativeTokenCache): Planned {
	const order = orderOf(args, { length: rows }, [rows], null);
	// Rows that are followed are trained once: the run ends with them.
	const length = args.follow ? { ...args, max_steps: -1, num_train_epochs: 1 } : args;
	return { order, plan: createPlan(length, order, cache) };
}

/** With packing, every sample has to fit into a micro-batch. */
export function checkFits(args: AgentTrainingConfig, source: AnySource, lengths: Uint32Array): void {
	const bound = args.max_tokens_per_micro_batch;
	if (bound === null) return;
	const row = lengths.findIndex((length) => length > bound);
	if (row < 0) return;
	throw new ArlError(
		"ARL_DATA",
		`${source.location(row)}: the sample has ${lengths[row]} tokens, and max_tokens_per_micro_batch is ${bound}`,
		"Raise max_tokens_per_micro_batch, or set max_length and truncation.",
	);
}

/** The steps of a run. `cache`: where packing finds lengths; null: the run is not packed. */
function createPlan(args: AgentTrainingConfig, order: RowOrder, cache: NativeTokenCache | null): StepPlan {
	const maxTokens = cache === null ? null : args.max_tokens_per_micro_batch;
	const options = {
		batchSize: args.per_device_train_batch_size,
		...(maxTokens !== null &&
			cache !== null && {
				packed: {
					maxTokens,
					pack: (rows: Uint32Array, bound: number) => cache.pack(rows, bound),
				},
			}),
	};
	const length = {
		maxSteps: args.max_steps,
		numTrainEpochs: args.num_train_epochs,
		gradientAccumulationSteps: microBatchesOfStep(args),
	};
	return new StepPlan((epoch) => epochBatches(order, epoch, options), length, maxTokens === null);
}

/** Every row, in the order of the source. */
export function allRows(source: AnySource): Uint32Array {
	const rows = new Uint32Array(source.length);
	for (let row = 0; row < rows.length; row++) rows[row] = row;
	return rows;
}

/** A place in a run: rows [0, row) of the epoch are done. */
interface RowPlace {
	epoch: number;
	row: number;
}

/** The rows that are encoded, soonest needed first. `next`: where training continues. */
export function wantedRows(
	args: AgentTrainingConfig,
	source: AnySource,
	{ order, plan }: Planned,
	next: { epoch: number; microBatch: number },
): Uint32Array {
	const samples = args.per_device_train_batch_size;
	const from = { epoch: next.epoch, row: next.microBatch * samples };
	// Rows of files are all checked; rows that are generated for this run are generated as far as they are needed.
	if (!Number.isFinite(source.lazy?.ahead ?? Number.POSITIVE_INFINITY))
		return fillOrder(order, source.length, from, null);
	const last = plan.place(plan.totalSteps - 1);
	const until = { epoch: last.epoch, row: last.end * samples };
	const start = source.lazy?.inOrder ? { epoch: 0, row: source.lazy.first ?? 0 } : from;
	return fillOrder(order, source.length, start, until);
}

/**
 * Rows in the order in which they are needed from `from` on. `until`: only those needed before it; null: all others that an
 * epoch may train too, so that each is checked.
 */
function fillOrder(order: RowOrder, rows: number, from: RowPlace, until: RowPlace | null): Uint32Array {
	const seen = new Uint8Array(rows);
	const wanted = new Uint32Array(rows);
	let count = 0;
	const take = (row: number) => {
		if (seen[row]) return;
		seen[row] = 1;
		wanted[count++] = row;
	};
	if (until === null) {
		for (const row of order.epoch(from.epoch).subarray(from.row)) take(row);
		for (const row of order.all) take(row);
		return wanted.subarray(0, count);
	}
	for (let epoch = from.epoch; epoch <= until.epoch && count < order.all.length; epoch++) {
		const end = epoch === until.epoch ? until.row : order.rowsPerEpoch;
		for (const row of order.epoch(epoch).subarray(epoch === from.epoch ? from.row : 0, end)) take(row);
	}
	return wanted.subarray(0, count);
}

/** Checkpoints that are still to be written, after `done` steps. */
export function countSaves(args: AgentTrainingConfig, plan: StepPlan, done: number, interval: number): number {
	if (args.save_strategy === "no") return 1;
	const left = plan.totalSteps - done;
	if (args.save_strategy === "steps") return Math.max(1, Math.ceil(left / interval));
	if (args.save_strategy === "best" && args.eval_strategy === "steps") {
		const evaluations = left / stepInterval(args.eval_steps ?? args.logging_steps, plan.totalSteps);
		return Math.max(1, Math.ceil(evaluations));
	}
	const last = plan.place(plan.totalSteps - 1).epoch;
	return Math.max(1, last - plan.place(Math.min(done, plan.totalSteps - 1)).epoch + 1);
}

/** Rows times epochs up to which the largest micro-batch is found by looking at each one. */
const EXACT_WORK = 4_000_000;

/**
 * The largest micro-batch of the run: exact where all lengths are known and the run is not too long to look through, else
 * a bound from the longest rows. Rows that are still being encoded may make a larger one; then the engine plans again.
 */
export function expectedBatch(
	args: AgentTrainingConfig,
	{ order, plan, cache, prefetcher, pictures }: Pick<Data, "order" | "plan" | "cache" | "prefetcher" | "pictures">,
): BatchSize {
	const lengths = cache.lengths();
	const packed = args.max_tokens_per_micro_batch;
	const epochs = plan.place(plan.totalSteps - 1).epoch + 1;
	if (prefetcher.complete && order.rowsPerEpoch * epochs <= EXACT_WORK) {
		let maxTokens = 0;
		let maxSequences = 0;
		const most = { maxPatches: 0, maxImages: 0 };
		for (let step = 0; step < plan.totalSteps; step++) {
			for (const rows of plan.rows(step)) {
				let tokens = 0;
				for (const row of rows) tokens += lengths[row] ?? 0;
				maxTokens = Math.max(maxTokens, tokens);
				maxSequences = Math.max(maxSequences, rows.length);
				const { images, patches } = pictures?.sizeOf(rows) ?? { images: 0, patches: 0 };
				most.maxPatches = Math.max(most.maxPatches, patches);
				most.maxImages = Math.max(most.maxImages, images);
			}
		}
		// A run that is resumed with all its steps done reads no row.
		return { maxTokens: Math.max(1, maxTokens), maxSequences, ...mostImages([most]) };
	}
	const imagesOf = (rows: number, tokens = Number.POSITIVE_INFINITY) => {
		const { images, patches } = pictures?.largest ?? { images: 0, patches: 0 };
		const most = Math.min(rows * patches, tokens * (pictures?.loader.patchesOfToken ?? 1));
		return mostImages([{ maxPatches: most, maxImages: Math.min(rows * images, most) }]);
	};
	const sorted = lengths.filter((length) => length > 0).sort();
	if (packed !== null) {
		let sequences = 0;
		for (let tokens = 0; sequences < sorted.length; sequences++) {
			tokens += sorted[sequences] as number;
			if (tokens > packed) break;
		}
		const maxSequences = Math.max(1, sequences);
		return { maxTokens: packed, maxSequences, ...imagesOf(maxSequences, packed) };
	}
	const count = Math.min(args.per_device_train_batch_size, order.rowsPerEpoch);
	const longest = sorted.slice(-count);
	const known = longest.reduce((sum, length) => sum + length, 0);
	// Before any row is encoded only the bound of the configuration is known.
	const bound = args.max_length ?? 1024;
	const maxTokens = known + (count - longest.length) * Math.min(bound, sorted.at(-1) ?? bound);
	return { maxTokens, maxSequences: count, ...imagesOf(count) };
}
