/**
 * What is counted while a run goes on: step by step, from one log line to the next, and for the checkpoint.
 */
import { epochAfter } from "../../data/sampler/batches.js";
import type { LogEvent, StepEvent } from "../../events.js";
import type { StepStats } from "../../native.js";
import { emptyWindow, freeOf, type LogWindow, type TrainerState } from "../checkpoint/state.js";
import type { PreparedRun } from "../setup/prepare.js";
import { flopsOf, type PreparedStep } from "./step.js";

/** What is counted while a run goes on. */
export interface Counters {
	step: number;
	numTokens: number;
	numTargetTokens: number;
	elapsedSeconds: number;
	lossSum: number;
	/** Steps that float16 could not compute, and that changed nothing. */
	skippedSteps: number;
	window: LogWindow;
}

/** Those of the checkpoint that the run goes on from, or none. */
export function countersOf(run: PreparedRun): Counters {
	const state = run.resumed?.state;
	return {
		step: state?.step ?? 0,
		numTokens: state?.numTokens ?? 0,
		numTargetTokens: state?.numTargetTokens ?? 0,
		elapsedSeconds: state?.elapsedSeconds ?? 0,
		lossSum: state?.lossSum ?? 0,
		skippedSteps: state?.skippedSteps ?? 0,
		window: { ...(state?.window ?? emptyWindow()) },
	};
}

/**
 * The learning rate of the next step, or of the one that is `ahead` steps behind it: a step that was skipped does not move the
 * schedule, as in Hugging Face's Trainer.
 */
export function nextLearningRate(run: PreparedRun, counters: Counters, ahead = 0): number {
	return run.schedule(counters.step + ahead - counters.skippedSteps);
}

/** A step's loss as sums take it: one that is not finite, whose step was skipped, counts as the mean of those before. */
function countedLoss(loss: number, sum: number, steps: number): number {
	return Number.isFinite(loss) ? loss : sum / Math.max(steps, 1);
}

/** Counts a step that is done, and tells of it. */
export function stepEvent(
	run: PreparedRun,
	counters: Counters,
	prepared: PreparedStep,
	stats: StepStats,
	time: { seconds: number; dataSeconds: number },
): StepEvent {
	const tokens = stats.microBatches.reduce((sum, part) => sum + part.tokens, 0);
	const targetTokens = stats.microBatches.reduce((sum, part) => sum + part.targetTokens, 0);
	const learningRate = nextLearningRate(run, counters);
	counters.lossSum += countedLoss(stats.loss, counters.lossSum, counters.step);
	counters.step += 1;
	if (stats.skipped) counters.skippedSteps += 1;
	counters.numTokens += tokens;
	counters.numTargetTokens += targetTokens;
	counters.elapsedSeconds += time.seconds;
	return {
		type: "step",
		step: counters.step,
		totalSteps: run.plan.totalSteps,
		epoch: epochAfter(prepared.place),
		loss: stats.loss,
		gradNorm: stats.gradNorm,
		learningRate,
		...(stats.lossScale !== undefined && {
			lossScale: stats.lossScale,
			skipped: stats.skipped,
			skippedSteps: counters.skippedSteps,
		}),
		tokens,
		targetTokens,
		numTokens: counters.numTokens,
		flops: flopsOf(run, prepared.batches),
		...time,
		rssBytes: process.memoryUsage.rss(),
		secondsLeft: 0,
	};
}

/** Adds a step to the window since the last log line. */
export function addToWindow(window: LogWindow, stats: StepStats, event: StepEvent): void {
	window.lossSum += countedLoss(stats.loss, window.lossSum, window.steps);
	window.steps += 1;
	// Where the loss is not finite, neither is what else the logits say.
	const counted = Number.isFinite(stats.loss) ? stats.microBatches : [];
	for (const { correct, entropySum, targetTokens } of counted) {
		window.microBatches += 1;
		// As in TRL: the mean over micro-batches, each counting the same, not over tokens.
		window.accuracySum += targetTokens > 0 ? correct / targetTokens : 0;
		window.entropySum += targetTokens > 0 ? entropySum / targetTokens : 0;
	}
	window.tokens += event.tokens;
	window.targetTokens += event.targetTokens;
	window.flops += event.flops;
	window.seconds += event.seconds;
	window.dataSeconds += event.dataSeconds;
}

/** The steps since the last log line, as one line. */
export function logEvent(counters: Counters, last: StepEvent): LogEvent {
	const { window } = counters;
	const seconds = Math.max(window.seconds, 1e-9);
	return {
		type: "log",
		metrics: {
			step: last.step,
			epoch: last.epoch,
			loss: window.lossSum / window.steps,
			grad_norm: last.gradNorm,
			learning_rate: last.learningRate,
			...(last.lossScale !== undefined && { loss_scale: last.lossScale, skipped_steps: last.skippedSteps }),
			mean_token_accuracy: window.accuracySum / Math.max(window.microBatches, 1),
			entropy: window.entropySum / Math.max(window.microBatches, 1),
			num_tokens: counters.numTokens,
			num_target_tokens: counters.numTargetTokens,
			tokens_per_second: window.tokens / seconds,
			target_tokens_per_second: window.targetTokens / seconds,
			gflops: window.flops / seconds / 1e9,
			step_seconds: window.seconds / window.steps,
			data_seconds: window.dataSeconds,
			rss_bytes: last.rssBytes,
			elapsed_seconds: counters.elapsedSeconds,
		},
	};
}

/** What a checkpoint keeps of the run. */
export function stateOf(run: PreparedRun, counters: Counters): TrainerState {
	const { plan, args } = run;
	const { step, ...sums } = counters;
	const last = plan.place(step - 1);
	const next = last.lastOfEpoch
		? { epoch: last.epoch + 1, microBatch: 0 }
		: { epoch: last.epoch, microBatch: last.end };
	return {
		version: 1,
		step,
		totalSteps: plan.totalSteps,
		epoch: epochAfter(last),
		next,
		...sums,
		...(run.datasetId !== null && { dataset: run.datasetId }),
		fixed: run.fixed,
		free: freeOf(args),
	};
}
