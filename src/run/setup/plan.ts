/**
 * What a run is going to do, from its options and rows: which rows are encoded, the steps, the largest micro-batch, the
 * checkpoints.
 */
import type { AgentTrainingConfig } from "../../config/schema.js";
import { epochBatches, StepPlan } from "../../data/sampler/batches.js";
import type { RowOrder } from "../../data/sampler/order.js";
import type { AnySource } from "../../data/sources/source.js";
import { ArlError } from "../../errors.js";
import type { NativeTokenCache } from "../../native.js";
import type { BatchSize } from "./options.js";
import { fillOrder } from "./rows.js";

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

/** Every row, in the order of the source. */
export function allRows(source: AnySource): Uint32Array {
	const rows = new Uint32Array(source.length);
	for (let row = 0; row < rows.length; row++) rows[row] = row;
	return rows;
}

/** The rows that are encoded, soonest needed first. */
export function wantedRows(
	args: AgentTrainingConfig,
	source: AnySource,
	order: RowOrder,
	plan: StepPlan | null,
	next: { epoch: number; microBatch: number },
): Uint32Array {
	const samples = args.per_device_train_batch_size;
	const from = { epoch: next.epoch, row: next.microBatch * samples };
	// Rows of files are all checked; what is made for this run alone is made as far as it is needed.
	if (!plan || !Number.isFinite(source.lazy?.ahead ?? Number.POSITIVE_INFINITY))
		return fillOrder(order, source.length, from, null);
	const last = plan.place(plan.totalSteps - 1);
	const until = { epoch: last.epoch, row: last.end * samples };
	if (source.lazy?.inOrder) return fillOrder(order, source.length, { epoch: 0, row: source.lazy.first ?? 0 }, until);
	return fillOrder(order, source.length, from, until);
}

/** The steps of a run; `cache` null: it is not packed. */
export function createPlan(args: AgentTrainingConfig, order: RowOrder, cache: NativeTokenCache | null): StepPlan {
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
		gradientAccumulationSteps: args.gradient_accumulation_steps,
	};
	return new StepPlan((epoch) => epochBatches(order, epoch, options), length, maxTokens === null);
}

/** Checkpoints that are still to be written. */
export function countSaves(args: AgentTrainingConfig, plan: StepPlan, done: number, interval: number): number {
	const left = plan.totalSteps - done;
	if (args.save_strategy === "steps") return Math.max(1, Math.ceil(left / interval));
	const last = plan.place(plan.totalSteps - 1).epoch;
	return Math.max(1, last - plan.place(Math.min(done, plan.totalSteps - 1)).epoch + 1);
}

/** Rows times epochs up to which the largest micro-batch is found by looking at each one. */
const EXACT_WORK = 4_000_000;

/**
 * The largest micro-batch of the run: exact where all lengths are known and the run is not too long to look through, else
 * a bound from the longest rows. Where rows are still being encoded a larger one may come; then the engine plans anew.
 */
export function expectedBatch(
	args: AgentTrainingConfig,
	order: RowOrder,
	plan: StepPlan,
	lengths: Uint32Array,
	complete: boolean,
): BatchSize {
	const packed = args.max_tokens_per_micro_batch;
	const epochs = plan.place(plan.totalSteps - 1).epoch + 1;
	if (complete && order.rowsPerEpoch * epochs <= EXACT_WORK) {
		let maxTokens = 0;
		let maxSequences = 0;
		for (let step = 0; step < plan.totalSteps; step++) {
			for (const rows of plan.rows(step)) {
				let tokens = 0;
				for (const row of rows) tokens += lengths[row] ?? 0;
				maxTokens = Math.max(maxTokens, tokens);
				maxSequences = Math.max(maxSequences, rows.length);
			}
		}
		// Where a run goes on with all its steps done, no row was read.
		return { maxTokens: Math.max(1, maxTokens), maxSequences };
	}
	const sorted = lengths.filter((length) => length > 0).sort();
	if (packed !== null) {
		let sequences = 0;
		for (let tokens = 0; sequences < sorted.length; sequences++) {
			tokens += sorted[sequences] as number;
			if (tokens > packed) break;
		}
		return { maxTokens: packed, maxSequences: Math.max(1, sequences) };
	}
	const count = Math.min(args.per_device_train_batch_size, order.rowsPerEpoch);
	const longest = sorted.slice(-count);
	const known = longest.reduce((sum, length) => sum + length, 0);
	// Before any row is encoded there is only the bound of the configuration to go by.
	const bound = args.max_length ?? 1024;
	return { maxTokens: known + (count - longest.length) * Math.min(bound, sorted.at(-1) ?? bound), maxSequences: count };
}
