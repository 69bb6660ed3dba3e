/**
 * The trainer's part of a checkpoint, as plain JSON: counters, and the options and inputs that a resumed run must share.
 * Weights, moments and random state are the engine's part; the order of rows follows from seed and step.
 */
import { followsEvaluations } from "../../config/check-evaluation.js";
import { above1, MESH_NAMES, worldOf } from "../../config/mesh.js";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { ArlError, messageOf } from "../../errors.js";
import type { EvaluationState } from "../eval/best.js";
import type { MetricScheduleState } from "../loop/metric-schedules.js";
import { loraOptions } from "../setup/lora.js";
import type { ModelFolder, ModelIdentity } from "../setup/model.js";
import { microBatchesOfStep, type ResolvedConfig } from "../setup/options.js";

/** Sums over the steps since the last log line. */
export type LogWindow = ReturnType<typeof emptyWindow>;

/** The window in which no step was taken yet. */
export function emptyWindow() {
	return {
		steps: 0,
		microBatches: 0,
		lossSum: 0,
		accuracySum: 0,
		entropySum: 0,
		tokens: 0,
		targetTokens: 0,
		flops: 0,
		seconds: 0,
		dataSeconds: 0,
	};
}

/** Values by name. People see both values of those that differ. */
export type Fingerprint = Record<string, string>;

export interface TrainerState {
	version: 1;
	/** Optimizer steps done. */
	step: number;
	totalSteps: number;
	/** Epochs done, with fraction. */
	epoch: number;
	/** Place of the next micro-batch: epoch, and number within it. */
	next: { epoch: number; microBatch: number };
	numTokens: number;
	numTargetTokens: number;
	elapsedSeconds: number;
	/** Sum of the losses of all steps. */
	lossSum: number;
	/** Steps so far that float16 could not compute and that changed nothing; absent: none. */
	skippedSteps?: number;
	window: LogWindow;
	/** The evaluations so far; absent: no rows are held out. */
	evaluation?: EvaluationState;
	/** Of a learning rate that follows evaluations; absent: it follows the steps. */
	schedule?: MetricScheduleState;
	/** Id of a user-supplied data set that has no identity of its own; absent: the rows are identified by their content. */
	dataset?: string;
	/** What a resumed run must share. */
	fixed: Fingerprint;
	/** What a resumed run may change. */
	free: Fingerprint;
}

/** Whether the run with this fingerprint computes in bfloat16; null: the fingerprint does not contain it. */
export function bf16Of(fixed: Fingerprint): boolean | null {
	return fixed.bf16 === "true" ? true : fixed.bf16 === "false" ? false : null;
}

/** Whether the run with this fingerprint trains images. */
export function trainsImages(fixed: Fingerprint): boolean {
	return fixed.images === "train";
}

/** The name of a database's list of documents in a fingerprint. */
export const DATABASE_LIST = "list of the database's documents";

const MODEL_CONFIG = "config.json of the model";
const MODEL_WEIGHTS = "weights of the model";

/** The identity of the model that the run with this fingerprint began with. */
export function modelIdentityOf(fixed: Fingerprint): ModelIdentity {
	return { config: fixed[MODEL_CONFIG] ?? "", weights: fixed[MODEL_WEIGHTS] ?? "" };
}

/** The inputs of a run, beyond its options. */
export interface RunIdentity {
	model: ModelFolder;
	dataIdentity: string;
	/** `open`: their number is not known. */
	rows: number | "open";
	entryRows: number[];
	/** Id of the list of a database's documents; null: no rows come from one. */
	databaseList: string | null;
	textFingerprint: string;
	warmupSteps: number;
	totalSteps: number;
	/** A hash of which rows are left out because an image cannot be read, as it may be later; null: none is. */
	badImages: string | null;
	/** Identity of the held-out rows; null: there are none. */
	heldOut: string | null;
	/** Steps between two evaluations. */
	evalInterval: number;
}

/** Schedules whose rates do not depend on the length of the run: a resumed run may be longer. */
const ENDLESS_SCHEDULES = ["constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy"];

/** What a resumed run must share with the run that it continues. */
export function fixedOf(args: ResolvedConfig, run: RunIdentity): Fingerprint {
	const endless = ENDLESS_SCHEDULES.includes(args.lr_scheduler_type);
	const mixture = args.train_weights.length > 0;
	const capped = args.train_caps.length > 0;
	const fixed: Record<string, unknown> = {
		"rows (content of the data set)": run.dataIdentity.slice(0, 16),
		"number of rows": run.rows,
		...(run.databaseList !== null && {
			[DATABASE_LIST]: run.databaseList,
			split: args.split,
			db_match: args.db_match,
			max_trained_count: args.max_trained_count,
			retrained_interval: args.retrained_interval,
		}),
		...((mixture || capped) && { "rows of each entry": run.entryRows }),
		...(mixture && { train_weights: args.train_weights }),
		...(capped && { train_caps: args.train_caps }),
		[MODEL_CONFIG]: run.model.identity.config.slice(0, 16),
		[MODEL_WEIGHTS]: args.init_from_config ? "random" : run.model.identity.weights.slice(0, 16),
		"template, tokenizer and text options": run.textFingerprint,
		...((args.images === "drop" || args.images === "train") && { images: args.images }),
		...(args.images === "train" && args.freeze.length > 0 && { freeze: [...args.freeze].sort() }),
		...(run.badImages !== null && { "rows left out for their images": run.badImages }),
		on_bad_row: args.on_bad_row,
		train_sampling_strategy: args.train_sampling_strategy,
		seed: args.seed,
		data_seed: args.data_seed ?? args.seed,
		per_device_train_batch_size: args.max_tokens_per_micro_batch === null ? args.per_device_train_batch_size : "packed",
		max_tokens_per_micro_batch: args.max_tokens_per_micro_batch,
		// Of all ranks: a resumed run may have another number of them.
		gradient_accumulation_steps: microBatchesOfStep(args),
		learning_rate: args.learning_rate,
		lr_scheduler_type: args.lr_scheduler_type,
		lr_scheduler_kwargs: args.lr_scheduler_kwargs,
		"warm-up steps": run.warmupSteps,
		...(!endless && { "steps of the whole run": run.totalSteps }),
		// Where the learning rate follows the evaluations, they are a part of the training.
		...(followsEvaluations(args) && {
			"held-out rows": run.heldOut?.slice(0, 16),
			eval_strategy: args.eval_strategy,
			"steps between evaluations": run.evalInterval,
			eval_delay: args.eval_delay,
			metric_for_best_model: args.metric_for_best_model,
			greater_is_better: args.greater_is_better,
		}),
		weight_decay: args.weight_decay,
		adam_beta1: args.adam_beta1,
		adam_beta2: args.adam_beta2,
		adam_epsilon: args.adam_epsilon,
		max_grad_norm: args.max_grad_norm,
		bf16: args.bf16,
		...(args.fp16 && { fp16: args.fp16 }),
		...(args.logits_16bit && { logits_16bit: args.logits_16bit }),
		...(args.bf16_stochastic_round && { bf16_stochastic_round: args.bf16_stochastic_round }),
		...(args.bf16_moments && { bf16_moments: args.bf16_moments }),
		loss_seq_chunk_size: args.loss_seq_chunk_size,
		...(args.load_in_4bit && { load_in_4bit: args.use_bnb_nested_quant ? "nested" : true }),
		...adapters(args),
	};
	return Object.fromEntries(Object.entries(fixed).map(([key, value]) => [key, shown(value)]));
}

/** The configuration of the run's adapters. */
function adapters(args: ResolvedConfig): Record<string, unknown> {
	const { lora, adapterDir } = loraOptions(args);
	if (lora === undefined) return {};
	return { "configuration of the adapters": JSON.parse(lora), ...(adapterDir && { adapter_name_or_path: adapterDir }) };
}

const FREE_OPTIONS = [
	"eval_strategy",
	"eval_steps",
	"metric_for_best_model",
	"load_best_model_at_end",
	"early_stopping_patience",
	"save_steps",
	"save_strategy",
	"save_total_limit",
	"logging_steps",
	"num_train_epochs",
	"max_steps",
	"threads",
	"gradient_checkpointing",
	"activation_offloading",
	"optimizer_offload",
	"attention",
	"output_dir",
	"merge_adapter",
] as const;

/** What a resumed run may change. */
export function freeOf(args: AgentTrainingConfig): Fingerprint {
	// Only where they differ from the default: checkpoints of earlier versions do not have them.
	const ranks = args.dp_size === 1 && !args.full_determinism ? [] : (["dp_size", "full_determinism"] as const);
	const divided = worldOf(args) === 1 ? [] : (["zero"] as const);
	const mesh = above1(args, [...MESH_NAMES, "dp_replicate_size"]);
	const measured = args.matmul_autotune ? [] : (["matmul_autotune"] as const);
	return Object.fromEntries(
		[...FREE_OPTIONS, ...ranks, ...divided, ...mesh, ...measured].map((name) => [name, shown(args[name])]),
	);
}

/** What a run that resumes on another mesh should know; null: its mesh is the old one. */
export function meshChange(old: Fingerprint, now: Fingerprint): string | null {
	const changed = MESH_NAMES.filter((name) => old[name] !== now[name]);
	if (changed.length === 0) return null;
	const text = changed.map((name) => `${name} ${old[name] ?? 1} -> ${now[name] ?? 1}`).join(", ");
	return `the run resumes on another mesh (${text}): its sums have another order, so that results are within rounding of those of the old one, not equal in bits`;
}

function shown(value: unknown): string {
	return typeof value === "string" ? value : JSON.stringify(value);
}

/** `name: old -> new` for all that differs. */
export function differences(old: Fingerprint, now: Fingerprint): string[] {
	const names = [...new Set([...Object.keys(old), ...Object.keys(now)])];
	return names
		.filter((name) => old[name] !== now[name])
		.map((name) => `${name}: ${old[name] ?? "none"} -> ${now[name] ?? "none"}`);
}

/** Throws `ARL_STATE` with everything that differs and must not. */
export function checkSameRun(checkpoint: string, state: TrainerState, fixed: Fingerprint): void {
	const changed = differences(state.fixed, fixed);
	if (changed.length === 0) return;
	throw new ArlError(
		"ARL_STATE",
		[`${checkpoint}: the checkpoint is of another run:`, ...changed].join("\n"),
		"Resume with the same rows, model and options, or start from scratch with another output_dir and the checkpoint as model_name_or_path.",
	);
}

/** Parses the state of a checkpoint. Throws `ARL_STATE` if it is not one. */
export function parseState(text: string, path: string): TrainerState {
	let value: unknown;
	try {
		value = JSON.parse(text);
	} catch (error) {
		throw new ArlError("ARL_STATE", `${path}: not JSON: ${messageOf(error)}`);
	}
	const state = value as Partial<TrainerState> | null;
	if (state?.version !== 1) {
		throw new ArlError("ARL_STATE", `${path}: unknown version ${String(state?.version)} of the trainer's state`);
	}
	if (typeof state.step !== "number" || !state.fixed || !state.window || !state.next) {
		throw new ArlError("ARL_STATE", `${path}: the trainer's state is incomplete`, "Resume from an earlier checkpoint.");
	}
	return state as TrainerState;
}
