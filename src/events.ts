/**
 * What a run reports: each event is a plain object that JSON can hold, distinguished by `type`.
 * An error is not an event: the iterator throws it as an `ArlError`.
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

/** A check before training that has passed. A check that fails ends the run with an error instead. */
export interface CheckEvent {
	type: "check";
	/** `model`, `adapters`, `tokenizer`, `stop token`, `output folder`, `disk`, `memory`, `rows`, `held-out rows`, `images`. */
	name: string;
	/** What was found, in one line. */
	message: string;
}

/** Progress of fetching a model or rows from the Hugging Face Hub, about twice a second. */
export interface DownloadEvent {
	type: "download";
	/** `Qwen/Qwen3-0.6B` */
	name: string;
	/** Of the files that were missing. */
	bytes: number;
	totalBytes: number;
	/** Since fetching began. */
	seconds: number;
}

/** Unusable rows that are left out with `on_bad_row skip`. */
export interface RowsSkippedEvent {
	type: "rows_skipped";
	/** Number of rows by reason. */
	reasons: Record<string, number>;
	rows: { location: string; reason: string; message: string }[];
}

/** Progress of encoding rows, about twice a second, and once when complete. */
export interface FillEvent {
	type: "fill";
	rows: number;
	totalRows: number;
	tokens: number;
	targetTokens: number;
	/** Samples cut to `max_length`. */
	truncated: number;
	/** Samples left out by `truncation drop`. */
	dropped: number;
	/** Images that the model sees, measured by this process; absent: none are trained. */
	images?: number;
	/** With `images drop`: images left out of the rows so far, also by an earlier part of the run. */
	imagesDropped?: DroppedImages;
	/** Since this process began to encode. */
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
		/** Model FLOPs of a token, attention excluded. */
		flopsPerToken: number;
		/** Attention takes `attentionFlops * n` FLOPs for each token of a sequence of length n. */
		attentionFlops: number;
	};
	data: {
		/** Where the rows come from, for people: file names, or `train_dataset`. */
		source: string;
		/** The rows' shape: `messages`, `prompt/completion`, ... */
		shape: string;
		rows: number;
		/** The number of rows is not known: `rows` is the most that the run needs. */
		unbounded: boolean;
		/** Rows that an epoch trains: after mixture weights, without dropped and skipped ones as far as known. */
		rowsPerEpoch: number;
		/** An earlier run has encoded all rows. */
		cached: boolean;
	};
	/** Planned bytes of memory by category. */
	memory: {
		categories: { name: string; bytes: number }[];
		totalBytes: number;
		/** In host memory. */
		hostCategories: { name: string; bytes: number }[];
		hostBytes: number;
	};
	outputDir: string;
	/** Optimizer steps of the whole run. */
	totalSteps: number;
	stepsPerEpoch: number;
	epochs: number;
	microBatchesPerStep: number;
	/** Steps that an earlier part of the run has done. */
	firstStep: number;
	seed: number;
}

/** The run resumes from a checkpoint. Lines logged after `step` are cut off, and will be logged again. */
export interface ResumedEvent {
	type: "resumed";
	step: number;
	checkpoint: string;
	/** Options that differ from those of the earlier part, as they may. */
	changed: string[];
	/** The held-out rows are evaluated first: the earlier part was interrupted in the evaluation after this step. */
	evaluates?: boolean;
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
	/** With fp16: the factor by which the loss was multiplied for the gradients. */
	lossScale?: number;
	/** With fp16: the loss or a gradient was not finite, so no weight was changed and the loss scale was halved. */
	skipped?: boolean;
	/** With fp16: skipped steps of the whole run so far. */
	skippedSteps?: number;
	/** Tokens of this step, targets of this step. */
	tokens: number;
	targetTokens: number;
	/** Tokens of the whole run so far. */
	numTokens: number;
	/** Model FLOPs of this step, forward and backward, without recomputation. */
	flops: number;
	/** Wall time from the end of the last step (or the start) to the end of this one. Some of its work may be done earlier. */
	seconds: number;
	/** Of these: waiting for rows. */
	dataSeconds: number;
	/** Resident memory of the process. */
	rssBytes: number;
	secondsLeft: number;
}

/** A line of `metrics.jsonl`: one for each `logging_steps` steps, and one for a shorter rest. */
export interface LogEvent {
	type: "log";
	metrics: Metrics;
}

/** Names as in TRL where it has them. Numbers cover the steps since the last log line, if not documented otherwise. */
export interface Metrics {
	step: number;
	epoch: number;
	/** Mean of the steps' losses; those of skipped steps that are not finite do not count. */
	loss: number;
	/** Of the last step, before clipping. */
	grad_norm: number;
	/** Used in the last step. */
	learning_rate: number;
	/** With fp16: of the last step. */
	loss_scale?: number;
	/** With fp16: skipped steps since the start of the run. */
	skipped_steps?: number;
	/** Mean over micro-batches of correct / targets. */
	mean_token_accuracy: number;
	/** Mean over micro-batches of the mean entropy of the targets' distributions, in nats. */
	entropy: number;
	/** Tokens since the start of the run. */
	num_tokens: number;
	/** Trained tokens since the start of the run. */
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

/** Progress of an evaluation, about twice a second. */
export interface EvaluatingEvent {
	type: "evaluating";
	/** Optimizer steps done. */
	step: number;
	rows: number;
	totalRows: number;
}

/** Held-out rows were evaluated. Its metrics are a line of `metrics.jsonl`. */
export interface EvaluateEvent {
	type: "evaluate";
	metrics: EvaluationMetrics;
	/** `metric_for_best_model` is better than in every evaluation of the run before. */
	best: boolean;
	/** The rows with the highest mean loss, at most ten, the highest first: `highest_losses` of the line. */
	highestLosses: HighLoss[];
}

/**
 * Names as in transformers and TRL where they have them. In addition, where the held-out rows have several sources:
 * `eval_<source>_loss` and the other figures of each source.
 */
export interface EvaluationMetrics {
	/** Optimizer steps done; 0: before the first. */
	step: number;
	/** Epochs done, with fraction. */
	epoch: number;
	/** Sum of the losses of all targets over the sum of their weights. */
	eval_loss: number;
	/** e to the power of `eval_loss`. */
	eval_perplexity: number;
	/** Share of all targets whose token was the most probable one. */
	eval_mean_token_accuracy: number;
	/** Mean over all targets of the entropy of the predicted distribution, in nats. */
	eval_entropy: number;
	/** With `eval_generate`: share of the generated replies that are right. */
	eval_exact_match?: number;
	/** Seconds, without those of `eval_generate`. */
	eval_runtime: number;
	eval_samples_per_second: number;
	/** Also `eval_<source>_<figure>`. */
	[name: `eval_${string}`]: number | undefined;
}

/**
 * The rows that were predicted worst when they were trained, since the epoch began, or since the run was resumed within it: at
 * the end of each epoch, before each checkpoint and at the end. A line `{"event":"trained_rows", ...}` of `metrics.jsonl`.
 */
export interface TrainedRowsEvent {
	type: "trained_rows";
	/** Optimizer steps done. */
	step: number;
	/** Epochs done, with fraction. */
	epoch: number;
	/** The first step whose rows are counted. */
	firstStep: number;
	/** At most ten, the highest first: `highest_losses` of the line. */
	highestLosses: HighLoss[];
}

/** A row, and how well the model predicts it. */
export interface HighLoss {
	/** Where the row is: `eval.jsonl:17`. */
	location: string;
	/** Name of the source, where the held-out rows have several. */
	source?: string;
	/** Sum of the losses of the row's targets over the sum of their weights, in nats. */
	loss: number;
	/** The row's targets. */
	targets: number;
}

/** A generated reply of a held-out row (`eval_generate`): a line `{"event":"sample", ...}` of `metrics.jsonl`. */
export interface SampleEvent {
	type: "sample";
	sample: Sample;
}

/** A generated reply, next to the expected one. */
export interface Sample {
	/** Optimizer steps done. */
	step: number;
	epoch: number;
	/** Name of the source, where the held-out rows have several. */
	source?: string;
	/** Where the row is: `eval.jsonl:17`. */
	location: string;
	/** Index of the reply among the row's messages. */
	message: number;
	/** The message before the reply, as `role: content`; empty where the row has none as text. */
	prompt: string;
	/** Both without the token that ends a reply. */
	expected: string;
	reply: string;
	/** The model ended its reply, and it is the expected one: tool calls are compared as JSON, text exactly. */
	right: boolean;
}

/** An epoch is done. */
export interface EpochEvent {
	type: "epoch";
	/** Epochs done: 1 after the first. */
	epoch: number;
	step: number;
}

/** A checkpoint is complete and verified. */
export interface SavedEvent {
	type: "saved";
	step: number;
	path: string;
	bytes: number;
	seconds: number;
	/** Why: `save_strategy` (`steps`, `epoch`, `best`), the last step, the run was stopped, or a callback asked for it. */
	reason: "steps" | "epoch" | "best" | "end" | "interrupted" | "requested";
}

/**
 * Something was removed from `output_dir`: an old checkpoint (`save_total_limit`), what a killed process left behind
 * (`unfinished`), or what this run has replaced (`replaced`).
 */
export interface RemovedEvent {
	type: "removed";
	path: string;
	reason: "save_total_limit" | "unfinished" | "replaced";
}

/** The last event. */
export interface EndEvent {
	type: "end";
	/**
	 * `completed`: all steps are done; `early_stopped`: `early_stopping_patience` ended it, and the model is saved as after all
	 * steps; `interrupted`: by the signal; `stopped`: by a callback.
	 */
	outcome: "completed" | "early_stopped" | "interrupted" | "stopped";
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
	| DownloadEvent
	| RowsSkippedEvent
	| FillEvent
	| StartEvent
	| ResumedEvent
	| StepEvent
	| LogEvent
	| EvaluatingEvent
	| EvaluateEvent
	| SampleEvent
	| TrainedRowsEvent
	| EpochEvent
	| SavedEvent
	| RemovedEvent
	| EndEvent;

/** The event of one type: `EventOf<"step">`. */
export type EventOf<T extends TrainEvent["type"]> = Extract<TrainEvent, { type: T }>;
