/** Options from code, resolved; and options as the core expects them. */
import { isDeepStrictEqual } from "node:util";
import { environmentLayer } from "../../config/environment.js";
import { dividesModel, type MeshSizes, worldOf } from "../../config/mesh.js";
import { isResolved, resolveConfig } from "../../config/resolve.js";
import {
	type AgentTrainingConfig,
	type AgentTrainingConfigInput,
	OPTION_NAMES,
	type OptionName,
	trainingSchema,
} from "../../config/schema.js";
import { ArlError } from "../../errors.js";
import type { EngineOptions, TextOptions } from "../../native.js";
import type { EngineMesh } from "../../ranks/batches.js";
import { loraOptions } from "./lora.js";

/**
 * Resolves options, unless they are resolved already. `notices` are for the user. `hasDataset`: the caller gives rows, so that a
 * database in the environment is ignored.
 */
export function resolveArgs(
	args: AgentTrainingConfigInput,
	hasDataset = false,
): { args: AgentTrainingConfig; notices: string[] } {
	if (isResolved(args)) return { args, notices: [] };
	const layers = [{ origin: "code", values: givenIn(args) }];
	const resolved = resolveConfig(hasDataset ? layers : [...environmentLayer(layers), ...layers]);
	return { args: resolved.args, notices: resolved.notices };
}

/**
 * The options that an object sets. An object with every option is a copy of a resolved configuration: a default in it was not
 * set by anyone, and contradicts nothing.
 */
function givenIn(args: AgentTrainingConfigInput): [string, unknown][] {
	const entries = Object.entries(args);
	if (!OPTION_NAMES.every((name) => Object.hasOwn(args, name))) return entries;
	return entries.filter(([name, value]) => {
		if (!Object.hasOwn(trainingSchema.shape, name)) return true;
		const { success, data } = trainingSchema.shape[name as OptionName].safeParse(undefined);
		return !success || !isDeepStrictEqual(value, data);
	});
}

/**
 * Options of the encoder. `maxPositions`: the bound on the length of a row where `max_length` is not set. `vision`: how images are
 * resized. With `images auto` they are those without images, until rows have shown some.
 */
export function textOptions(
	args: AgentTrainingConfig,
	maxPositions: number | null,
	vision: { info: { fingerprint: string } } | null,
): TextOptions {
	const maxLength = args.max_length ?? maxPositions;
	return {
		modelDir: args.model_name_or_path,
		truncation: args.truncation,
		columns: args.columns,
		images: args.images === "auto" ? "error" : args.images,
		...(args.images === "train" && vision && { imageProcessor: vision.info.fingerprint }),
		dropZeroAdvantage: args.drop_zero_advantage,
		skipNonPositiveAdvantage: args.skip_non_positive_advantage,
		...(args.chat_template !== null && { chatTemplate: args.chat_template }),
		...(args.chat_template_date !== null && { chatTemplateDate: args.chat_template_date }),
		...(maxLength !== null && { maxLength }),
		...(args.thinking !== null && { thinking: args.thinking }),
		...(args.minimal_advantage !== null && { minimalAdvantage: args.minimal_advantage }),
	};
}

/** A configuration in which nothing depends on the device any more. */
export type ResolvedConfig = AgentTrainingConfig & { bf16: boolean };

/** Whether the engine computes in bfloat16. `before`: whether the earlier part of the run did; null: not known. */
export function resolveBf16(bf16: boolean | "auto", device: string, before: boolean | null = null): boolean {
	return bf16 === "auto" ? (before ?? device !== "cpu") : bf16;
}

/** The type of weights and activations. */
export function dtypeOf(args: ResolvedConfig): EngineOptions["dtype"] {
	return args.fp16 ? "f16" : args.bf16 ? "bf16" : "f32";
}

/** Resolves what depends on the device. `notices`: options that have no effect there. */
export function resolveForDevice(
	args: AgentTrainingConfig,
	device: string,
): { args: ResolvedConfig; notices: string[] } {
	const settled = { ...args, bf16: !args.fp16 && resolveBf16(args.bf16, device) };
	if (device !== "cpu") return { args: settled, notices: [] };
	const moot = (["activation_offloading", "optimizer_offload"] as const).filter((name) => args[name]);
	return {
		args: { ...settled, activation_offloading: false, optimizer_offload: false },
		notices: moot.map((name) => `${name} has no effect on the CPU: everything is in the host's memory already`),
	};
}

/** The largest micro-batch that is expected. */
export interface BatchSize {
	maxTokens: number;
	maxSequences: number;
	/** Of the images of the micro-batch with the most, trained or evaluated; absent: no images are trained. */
	maxPatches?: number;
	maxImages?: number;
	/** Of held-out rows; absent: none are evaluated. */
	evalMaxTokens?: number;
	evalMaxSequences?: number;
	/** Of each prompt whose reply is generated in an evaluation, its tokens, by those generated at a time; absent: none is. */
	evalPrompts?: number[][];
	/** New tokens of such a reply, at most. */
	evalMaxNewTokens?: number;
}

/** The most images and patches of several micro-batches; empty: none has any. */
export function mostImages(
	sizes: readonly (Pick<BatchSize, "maxPatches" | "maxImages"> | null)[],
): Pick<BatchSize, "maxPatches" | "maxImages"> {
	const maxPatches = Math.max(...sizes.map((size) => size?.maxPatches ?? 0));
	const maxImages = Math.max(...sizes.map((size) => size?.maxImages ?? 0));
	return maxPatches === 0 ? {} : { maxPatches, maxImages };
}

type Divided = MeshSizes & Pick<AgentTrainingConfig, "zero">;

/** What the ranks divide among them; by itself, as long as memory does not ask for more (`divideToFit`). */
export function zeroOf(args: Divided): 0 | 1 | 2 | 3 {
	if (worldOf(args) === 1) return 0;
	if (args.zero !== "auto") return args.zero;
	return args.dp_replicate_size > 1 ? 3 : 2;
}

const DIVIDED = [
	"nothing",
	"moments and master weights",
	"gradients, moments and master weights",
	"weights, gradients, moments and master weights",
];

/** A sentence about what the ranks divide, which is `taken`; null: there is one, and nobody has asked. */
export function zeroText(args: Divided, taken: number): string | null {
	const { zero } = args;
	const world = worldOf(args);
	const ranks = dividesModel(args) ? "ranks with the same weights" : `${world} ranks`;
	if (world === 1) return zero === "auto" ? null : "zero has no effect: one rank has nothing to divide";
	const replicas = args.dp_replicate_size;
	const fits = taken < 3 || replicas > 1;
	const why = zero !== "auto" ? "" : fits ? " (auto)" : " (auto: 2 does not fit a rank's share of the memory)";
	const within = replicas > 1 ? `, weights within each of ${replicas} replicas` : "";
	return `zero ${taken}${why}: ${ranks} divide ${DIVIDED[taken]} among them${within}`;
}

/** Options of the engine. */
export function engineOptions(args: ResolvedConfig, device: string, size: BatchSize): EngineOptions {
	return {
		modelDir: args.model_name_or_path,
		initFromConfig: args.init_from_config,
		seed: args.seed,
		device,
		dtype: dtypeOf(args),
		logits16bit: args.logits_16bit,
		stochasticRounding: args.bf16_stochastic_round,
		bf16Moments: args.bf16_moments,
		recompute: args.gradient_checkpointing,
		...size,
		adamBeta1: args.adam_beta1,
		adamBeta2: args.adam_beta2,
		adamEpsilon: args.adam_epsilon,
		weightDecay: args.weight_decay,
		activationOffloading: args.activation_offloading,
		optimizerOffload: args.optimizer_offload,
		attention: args.attention,
		matmulAutotune: args.matmul_autotune && !args.full_determinism,
		// Without images the tower is carried as it is.
		...(args.images === "train" && { vision: true, freeze: [...args.freeze].sort() }),
		...loraOptions(args),
		...(args.load_in_4bit && { loadIn4bit: true, nestedQuant: args.use_bnb_nested_quant }),
		// Several ranks always sum so; one on a GPU never does.
		...((worldOf(args) > 1 || (device === "cpu" && args.full_determinism)) && { dataParallel: args.dp_size }),
		...meshOptions(args),
		...(zeroOf(args) > 0 && { zero: zeroOf(args) }),
		...(args.loss_seq_chunk_size !== null && { lossSeqChunkSize: args.loss_seq_chunk_size }),
		...(args.threads !== null && { threads: args.threads }),
	};
}

/** The engine's options of a mesh: what is 1 is left out. */
export function meshOptions(sizes: MeshSizes): EngineMesh {
	const { dp_replicate_size: replicas, tp_size: tp, cp_size: cp, ep_size: ep, pp_size: pp } = sizes;
	return {
		...(replicas > 1 && { dpReplicateSize: replicas }),
		...(tp > 1 && { tpSize: tp }),
		...(cp > 1 && { cpSize: cp }),
		...(ep > 1 && { epSize: ep }),
		...(pp > 1 && { ppSize: pp }),
	};
}

/** A count of steps that may be given as a part of all steps (below 1); rounded up as Hugging Face does. */
export function stepInterval(value: number, totalSteps: number): number {
	return value < 1 ? Math.max(1, Math.ceil(totalSteps * value)) : value;
}

/** The name of the cache in `output_dir`, and the prefix of the folders in it that belong to one run alone. */
export const CACHE_FOLDER = ".cache";
export const RUN_FOLDER = "run-";

/** The folder of the token cache. */
export function cacheDir(args: AgentTrainingConfig): string {
	return args.cache_dir ?? `${args.output_dir}/${CACHE_FOLDER}`;
}

/** Samples of a whole optimizer step that is not packed. */
export function samplesOfStep(args: AgentTrainingConfig): number {
	return args.per_device_train_batch_size * microBatchesOfStep(args);
}

/** Micro-batches of a whole optimizer step, on all ranks. Ranks that divide a model or its tokens compute the same ones together. */
export function microBatchesOfStep(args: Pick<AgentTrainingConfig, "dp_size" | "gradient_accumulation_steps">): number {
	return args.dp_size * args.gradient_accumulation_steps;
}

/**
 * For how many seconds rows are checked before the first step. Less for a database than for files: it may have any number of
 * rows, and sends them over a network; this is long enough for a small one.
 */
export function preprocessSeconds(args: AgentTrainingConfig, hasDataset: boolean): number {
	const database = args.db_connection_string !== null && args.train_file.length === 0 && !hasDataset;
	return args.preprocess_seconds ?? (database ? 0.2 : 20);
}

/** Throws `ARL_CONFIG` if neither files nor a database nor a data set are given. */
export function checkRowsGiven(args: AgentTrainingConfig, hasDataset: boolean): void {
	if (hasDataset || args.train_file.length > 0 || args.db_connection_string !== null) return;
	throw new ArlError(
		"ARL_CONFIG",
		"no rows are given: train_file is missing, and so are dataset and db_connection_string",
		"For example --train_file rows.jsonl, or --dataset ./my-dataset.ts",
	);
}
