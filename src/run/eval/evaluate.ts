/**
 * The figures of held-out rows. Each row's sums come from the engine and are added in the order of the rows, in f64, so that the
 * result has the same bits however the rows are cut into micro-batches.
 */
import type { Data } from "../../data/sampler/data.js";
import { ArlError } from "../../errors.js";
import type { EvaluatingEvent, EvaluationMetrics, HighLoss } from "../../events.js";
import type { MicroBatchStats, NativeEngine, TextOptions } from "../../native.js";
import type { BatchSize } from "../setup/options.js";
import type { ImageMode, Vision } from "../setup/vision.js";
import { highestLosses } from "./highest-losses.js";

/** Consecutive held-out rows of one origin. */
export interface EvalPart {
	name: string;
	/** Rows [first, end). */
	first: number;
	end: number;
}

/** Held-out rows, encoded. Each of the data's steps is one micro-batch. */
export interface HeldOut {
	data: Data;
	/** The sources. */
	parts: EvalPart[];
	/** The largest micro-batch. */
	size: BatchSize;
	/** How the rows became tokens. */
	textOptions: TextOptions;
	/** What happens to their images. */
	images: ImageMode;
	/** How their images are loaded; null: no images are trained. */
	vision: Vision | null;
}

/** The figures of an evaluation. */
export type EvaluationFigures = Pick<
	EvaluationMetrics,
	"eval_loss" | "eval_perplexity" | "eval_mean_token_accuracy" | "eval_entropy"
> & { [name: `eval_${string}`]: number };

/** What is found of all held-out rows. */
export interface Evaluated {
	figures: EvaluationFigures;
	rows: number;
	highestLosses: HighLoss[];
}

/** Micro-batches that the engine has at a time: it computes one while the next is put together. */
const IN_PROGRESS = 2;

const REPORT_MILLISECONDS = 500;

/** Evaluates all rows with the weights as they are, those after `after` steps, and yields progress. Null: `signal` ended it. */
export async function* evaluateRows(
	engine: Pick<NativeEngine, "evaluateSequences">,
	{ data, parts }: HeldOut,
	after: number,
	signal: AbortSignal | null,
): AsyncGenerator<EvaluatingEvent, Evaluated | null> {
	const progress = { type: "evaluating", step: after, rows: 0, totalRows: data.order.rowsPerEpoch } as const;
	let [rowsDone, reported] = [0, performance.now()];
	const byRow = new Array<MicroBatchStats | undefined>(data.source.length);
	const running: Promise<void>[] = [];
	for (let step = 0; step < data.plan.totalSteps && !signal?.aborted; step++) {
		const found = await data.step(step);
		const [rows, batch] = [found?.rows[0], found?.batches[0]];
		if (rows === undefined || batch === undefined) throw new ArlError("ARL_INTERNAL", "held-out rows have ended early");
		const done = engine.evaluateSequences(batch).then((stats) => {
			for (const [i, row] of rows.entries()) byRow[row] = stats[i];
			rowsDone += rows.length;
		});
		// A failure surfaces where it is awaited.
		done.catch(() => {});
		running.push(done);
		if (running.length >= IN_PROGRESS) await running.shift();
		if (performance.now() - reported < REPORT_MILLISECONDS) continue;
		reported = performance.now();
		yield { ...progress, rows: rowsDone };
	}
	await Promise.all(running);
	if (signal?.aborted) return null;
	const all = sumsOf(byRow);
	if (all.weight === 0) {
		throw new ArlError(
			"ARL_DATA",
			`${data.source.name}: no token of the held-out rows is a target`,
			"Check that the rows have replies, and that truncation does not cut them off.",
		);
	}
	const figures = figuresOf(all);
	if (parts.length > 1) {
		for (const { name, first, end } of parts) {
			const sums = sumsOf(byRow.slice(first, end));
			if (sums.weight > 0) Object.assign(figures, figuresOf(sums, `${name}_`));
		}
	}
	return { figures, rows: all.rows, highestLosses: highestLosses(byRow, data.source, parts) };
}

function sumsOf(stats: readonly (MicroBatchStats | undefined)[]) {
	const sums = { rows: 0, targets: 0, weight: 0, loss: 0, correct: 0, entropy: 0 };
	for (const row of stats) {
		if (row === undefined) continue;
		sums.rows += 1;
		sums.targets += row.targetTokens;
		sums.weight += row.targetWeight;
		sums.loss += row.lossSum;
		sums.correct += row.correct;
		sums.entropy += row.entropySum;
	}
	return sums;
}

function figuresOf(
	{ targets, weight, loss, correct, entropy }: ReturnType<typeof sumsOf>,
	source = "",
): EvaluationFigures {
	return {
		[`eval_${source}loss`]: loss / weight,
		[`eval_${source}perplexity`]: Math.exp(loss / weight),
		[`eval_${source}mean_token_accuracy`]: correct / targets,
		[`eval_${source}entropy`]: entropy / targets,
	} as EvaluationFigures;
}
