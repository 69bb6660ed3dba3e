/**
 * What a run tells while it goes: one plain object an event, told apart by `type`, all of them JSON.
 * Knows nothing of who listens. An error is not an event: the iterator throws it as an `ArlError`.
 */

import type { DroppedImages } from "./data/tokens/notes.js";

/** Something a user should read; nothing depends on it. */
export interface NoticeEvent {
	type: "notice";
	level: "info" | "warning";
	message: string;
}

/** A notice as an event. */
export function notice(level: NoticeEvent["level"], message: string): NoticeEvent {
	return { type: "notice", level, message };
}

/** A check made before training, in the order made. A check that fails ends the run with an error instead. */
export interface CheckEvent {
	type: "check";
	/** `model`, `tokenizer`, `stop token`, `output folder`, `disk`, `memory`, `rows`, `images`. */
	name: string;
	/** One line of what was found. */
	message: string;
}

/** Rows that cannot be used, as they are left out with `on_bad_row skip`. All of them over all events. */
export interface RowsSkippedEvent {
	type: "rows_skipped";
	/** How many rows of this report, by reason. */
	reasons: Record<string, number>;
	rows: { location: string; reason: string; message: string }[];
}

/** Progress of rows becoming tokens, at most about two a second, and once when complete. */
export interface FillEvent {
	type: "fill";
	rows: number;
	totalRows: number;
	tokens: number;
	targetTokens: number;
	/** Samples cut to `max_length`. */
	truncated: number;
	/** Samples left out by `truncation: drop`. */
	dropped: number;
	/** With `images: drop`: what was left out of the rows, those of an earlier part of the run included. */
	imagesDropped?: DroppedImages;
	/** Since the start of this run's own filling. */
	seconds: number;
	complete: boolean;
}

/** The run is ready; the first step comes next. */
export interface StartEvent {
	type: "start";
	model: {
		path: string;
		modelType: string;
		parameters: number;
		device: string;
		dtype: string;
		/** Model FLOPs a token without attention's share. */
		flopsPerToken: number;
		/** Attention's FLOPs for a token of a sequence of length n are `attentionFlops * n`. */
		attentionFlops: number;
	};
	data: {
		/** What was read, for people: file names, or `train_dataset`. */
		source: string;
		/** The rows' shape: `messages`, `prompt/completion`, ... */
		shape: string;
		rows: number;
		/** Nobody knows how many rows there are: `rows` is what the run needs at most. */
		unbounded: boolean;
		/** Rows an epoch trains on: after mixture weights, less dropped and skipped ones as far as known. */
		rowsPerEpoch: number;
		/** Found in the cache of an earlier run: nothing to encode. */
		cached: boolean;
	};
	/** Planned bytes of memory by category. */
	memory: {
		categories: { name: string; bytes: number }[];
		totalBytes: number;
		/** What is offloaded to the host's memory. */
		hostCategories: { name: string; bytes: number }[];
		hostBytes: number;
	};
	outputDir: string;
	/** Optimizer steps of the whole run. */
	totalSteps: number;
	stepsPerEpoch: number;
	epochs: number;
	microBatchesPerStep: number;
	/** Steps done before (a resumed run), else 0. */
	firstStep: number;
	seed: number;
}

/** The run goes on from a checkpoint. What was logged after `step` is cut off: it will be logged again. */
export interface ResumedEvent {
	type: "resumed";
	step: number;
	checkpoint: string;
	/** Options that differ from the earlier run and may. */
	changed: string[];
}

/** One optimizer step is done. */
export interface StepEvent {
	type: "step";
	/** 1 for the first. */
	step: number;
	totalSteps: number;
	/** Epochs done, with fraction. */
	epoch: number;
	/** Loss over all targets of this step. */
	loss: number;
	gradNorm: number;
	learningRate: number;
	/** With fp16: the factor on the loss that gradients were computed with. */
	lossScale?: number;
	/** With fp16: the loss or a gradient was not finite, no weight was changed, and the loss scale was halved. */
	skipped?: boolean;
	/** With fp16: steps of the whole run so far that were skipped. */
	skippedSteps?: number;
	/** Tokens of this step, targets of this step. */
	tokens: number;
	targetTokens: number;
	/** Tokens of the whole run so far. */
	numTokens: number;
	/** Model FLOPs of this step, forward and backward, recomputation not counted. */
	flops: number;
	/** Wall time from the end of the last step (or the start) to the end of this one, part of which may be computed before. */
	seconds: number;
	/** Of it: waiting for rows. */
	dataSeconds: number;
	/** Resident memory of the process. */
	rssBytes: number;
	secondsLeft: number;
}

/** A line of the log: what `metrics.jsonl` holds, one each `logging_steps` and one for a last, shorter window. */
export interface LogEvent {
	type: "log";
	metrics: Metrics;
}

/** The names of the first line are those of TRL. Numbers cover the steps since the last log line unless said. */
export interface Metrics {
	step: number;
	epoch: number;
	/** Mean of the steps' losses; those that are not finite (their steps were skipped) do not count. */
	loss: number;
	/** Of the last step, before clipping. */
	grad_norm: number;
	/** Used in the last step. */
	learning_rate: number;
	/** With fp16: of the last step. */
	loss_scale?: number;
	/** With fp16: steps since the start of the run that were skipped. */
	skipped_steps?: number;
	/** Mean over micro-batches of correct / targets. */
	mean_token_accuracy: number;
	/** Mean over micro-batches of the mean entropy of the targets' distributions, in nats. */
	entropy: number;
	/** Tokens since the start of the run. */
	num_tokens: number;
	/** Tokens since the start of the run that were trained. */
	num_target_tokens: number;
	tokens_per_second: number;
	target_tokens_per_second: number;
	/** Model GFLOP/s. */
	gflops: number;
	step_seconds: number;
	data_seconds: number;
	rss_bytes: number;
	/** Seconds of training since the start of the run, earlier parts of a resumed one included. */
	elapsed_seconds: number;
}

/** An epoch is through. */
export interface EpochEvent {
	type: "epoch";
	/** Epochs done: 1 after the first. */
	epoch: number;
	step: number;
}

/** A checkpoint stands, complete and verified. */
export interface SavedEvent {
	type: "saved";
	step: number;
	path: string;
	bytes: number;
	seconds: number;
	/** Why: `save_strategy` (`steps`, `epoch`), the last step, the run was stopped, or a callback asked for it. */
	reason: "steps" | "epoch" | "end" | "interrupted" | "requested";
}

/**
 * Something was removed from `output_dir`: an old checkpoint (`save_total_limit`), what a killed process left (`unfinished`), or
 * what this run has taken the place of (`replaced`).
 */
export interface RemovedEvent {
	type: "removed";
	path: string;
	reason: "save_total_limit" | "unfinished" | "replaced";
}

/** The last event. */
export interface EndEvent {
	type: "end";
	/** `completed`: all steps; `interrupted`: asked to stop; `stopped`: a callback asked. */
	outcome: "completed" | "interrupted" | "stopped";
	steps: number;
	totalSteps: number;
	epoch: number;
	/** Mean of the losses of all steps of this process. */
	trainLoss: number | null;
	seconds: number;
	numTokens: number;
	/** Where the model is, in Hugging Face's layout; null: nothing was saved. */
	modelPath: string | null;
	outputDir: string;
}

export type TrainEvent =
	| NoticeEvent
	| CheckEvent
	| RowsSkippedEvent
	| FillEvent
	| StartEvent
	| ResumedEvent
	| StepEvent
	| LogEvent
	| EpochEvent
	| SavedEvent
	| RemovedEvent
	| EndEvent;

/** The event of one type: `EventOf<"step">`. */
export type EventOf<T extends TrainEvent["type"]> = Extract<TrainEvent, { type: T }>;
