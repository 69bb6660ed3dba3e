/** What a run counts: over all its steps, and from one log line to the next. */
import { epochAfter, type StepPlace } from "../../data/sampler/batches.js";
import type { LogEvent, StepEvent } from "../../events.js";
import type { StepStats } from "../../native.js";
import { emptyWindow, type LogWindow, type TrainerState } from "../checkpoint/state.js";

/** A step that is done. */
export interface StepDone {
	place: StepPlace;
	stats: StepStats;
	learningRate: number;
	/** Model FLOPs. */
	flops: number;
	totalSteps: number;
	time: Pick<StepEvent, "seconds" | "dataSeconds" | "secondsLeft">;
}

/** The counters of a run, which a checkpoint keeps. */
export class Counters {
	step: number;
	numTokens: number;
	numTargetTokens: number;
	elapsedSeconds: number;
	/** Sum of the losses of all steps. */
	lossSum: number;
	/** Steps that float16 could not compute, and that changed nothing. */
	skippedSteps: number;
	/** Sums since the last log line. */
	window: LogWindow;

	/** `state`: of the checkpoint that the run resumes from. */
	constructor(state?: TrainerState) {
		this.step = state?.step ?? 0;
		this.numTokens = state?.numTokens ?? 0;
		this.numTargetTokens = state?.numTargetTokens ?? 0;
		this.elapsedSeconds = state?.elapsedSeconds ?? 0;
		this.lossSum = state?.lossSum ?? 0;
		this.skippedSteps = state?.skippedSteps ?? 0;
		this.window = { ...(state?.window ?? emptyWindow()) };
	}

	/** Counts a step. */
	count({ place, stats, learningRate, flops, totalSteps, time }: StepDone): StepEvent {
		const tokens = stats.microBatches.reduce((sum, part) => sum + part.tokens, 0);
		const targetTokens = stats.microBatches.reduce((sum, part) => sum + part.targetTokens, 0);
		this.lossSum += countedLoss(stats.loss, this.lossSum, this.step);
		this.step += 1;
		if (stats.skipped) this.skippedSteps += 1;
		this.numTokens += tokens;
		this.numTargetTokens += targetTokens;
		this.elapsedSeconds += time.seconds;
		const event: StepEvent = {
			type: "step",
			step: this.step,
			totalSteps,
			epoch: epochAfter(place),
			loss: stats.loss,
			gradNorm: stats.gradNorm,
			learningRate,
			...(stats.lossScale !== undefined && {
				lossScale: stats.lossScale,
				skipped: stats.skipped,
				skippedSteps: this.skippedSteps,
			}),
			tokens,
			targetTokens,
			numTokens: this.numTokens,
			flops,
			seconds: time.seconds,
			dataSeconds: time.dataSeconds,
			rssBytes: process.memoryUsage.rss(),
			secondsLeft: time.secondsLeft,
		};
		this.addToWindow(stats, event);
		return event;
	}

	private addToWindow(stats: StepStats, event: StepEvent): void {
		const { window } = this;
		window.lossSum += countedLoss(stats.loss, window.lossSum, window.steps);
		window.steps += 1;
		// If the loss is not finite, neither are the other figures.
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

	/** The steps since the last log line, as one line; the next window begins. */
	log(last: StepEvent): LogEvent {
		const { window } = this;
		this.window = emptyWindow();
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
				num_tokens: this.numTokens,
				num_target_tokens: this.numTargetTokens,
				tokens_per_second: window.tokens / seconds,
				target_tokens_per_second: window.targetTokens / seconds,
				gflops: window.flops / seconds / 1e9,
				step_seconds: window.seconds / window.steps,
				data_seconds: window.dataSeconds,
				rss_bytes: last.rssBytes,
				elapsed_seconds: this.elapsedSeconds,
			},
		};
	}
}

/** A step's loss as sums take it: one that is not finite, whose step was skipped, counts as the mean of those before. */
function countedLoss(loss: number, sum: number, steps: number): number {
	return Number.isFinite(loss) ? loss : sum / Math.max(steps, 1);
}
