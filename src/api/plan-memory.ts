/** The memory that a run takes, by category, before anything is loaded: from the options and the model's `config.json` alone. */
import { namesHeldOut } from "../config/eval-sources.js";
import { worldOf } from "../config/mesh.js";
import type { AgentTrainingConfig } from "../config/schema.js";
import { deviceToPlan, hostInfo } from "../device/index.js";
import { ArlError } from "../errors.js";
import { modelFolder } from "../hub/index.js";
import {
	type DeviceInfo,
	type EngineOptions,
	loadNative,
	type Native,
	type MemoryPlan as NativePlan,
} from "../native.js";
import { SPARE_TOKENS } from "../run/eval/replies.js";
import { type Advice, advise, CONTEXT_BYTES, divideToFit, ofEveryStage } from "../run/setup/memory.js";
import { type ModelFacts, readModelFacts } from "../run/setup/model.js";
import {
	type BatchSize,
	dtypeOf,
	engineOptions,
	mostImages,
	type ResolvedConfig,
	resolveArgs,
	resolveForDevice,
} from "../run/setup/options.js";
import type { RowArguments } from "./rows.js";

/** Memory of GPUs that are sold, in GB as their makers count. */
export const GPU_SIZES = [24, 40, 48, 80, 141] as const;
const GB = 1e9;
/** The most tokens that a plan is made for: what the engine's counts of them hold. */
export const MOST_TOKENS = 2 ** 31 - 1;
/** Replies that the engine generates at a time, at most, however many a call asks for. */
const MOST_REPLIES = 256;

/** The largest micro-batch; what is absent or null follows from the options. */
export interface PlanSize {
	/** Absent: `max_tokens_per_micro_batch`, else `per_device_train_batch_size` times `max_length`. */
	tokens?: number | null;
	/** Absent: `per_device_train_batch_size`; of packed micro-batches one for each 64 tokens. */
	sequences?: number | null;
	/** Patches of its images. Absent: with `images train` an image of `max_pixels` a sample, as far as tokens suffice; else none. */
	patches?: number | null;
	/** Its images. Absent: one a sample. */
	pictures?: number | null;
}

/** Bytes of one category. */
export interface MemoryCategory {
	/** `weights`, `gradients`, `moments`, `activations`, ... */
	name: string;
	bytes: number;
}

/** An option that saves memory, and what is needed with it. */
export interface MemoryChange {
	/** As on the command line. */
	flags: string;
	savedBytes: number;
	totalBytes: number;
	hostBytes: number;
}

/** The memory of a run. */
export interface MemoryPlan {
	device: string;
	dtype: "f32" | "bf16" | "f16";
	/** Parameters of the model, tied ones once. */
	parameters: number;
	/** Those that are trained: all, or those of adapters and whole copies. */
	trainedParameters: number;
	/** Of the largest micro-batch. */
	tokens: number;
	sequences: number;
	/** Patches and images of a micro-batch; null: no images are planned for. */
	patches: number | null;
	images: number | null;
	/** Of the largest micro-batch of held-out rows; null: the options name none. */
	evalTokens: number | null;
	evalSequences: number | null;
	/** Replies to held-out rows that are generated at a time; null: none are. */
	evalReplies: number | null;
	/** Tokens of each of their prompts; null: none are generated. */
	evalPromptTokens: number | null;
	/** Memory of the device. */
	categories: MemoryCategory[];
	totalBytes: number;
	/** What is offloaded to host memory. */
	hostCategories: MemoryCategory[];
	hostBytes: number;
	/** Bytes that the device has free; null: it is not in this machine. */
	availableBytes: number | null;
	/** Whether that suffices; null: not known. */
	fits: boolean | null;
	/** What would save memory, the largest saving first; empty where the plan fits. */
	changes: MemoryChange[];
	/** What one of several ranks sends in a step; null: there is one rank. The memory is that of each rank. */
	sent: SentBytes | null;
	/** What to know of how the options apply to the device. */
	notices: string[];
}

/** Bytes that a rank sends to others in a step; a few hundred for each micro-batch's figures come on top. */
export interface SentBytes {
	/** Gradients, to the ranks that sum them. */
	gradients: number;
	/** Sums of gradients, to all ranks. */
	sums: number;
	/** Weights, to all ranks: those that were updated, or with zero 3 those that a pass needs. */
	weights: number;
	/** Updated weights, to the ranks that keep the same ones in other replicas. */
	replicas: number;
	/** Activations and their gradients, to ranks that have other tokens, heads, experts or layers. */
	tokens: number;
	/** All of them. */
	total: number;
}

/** A plan with all that it was made of. */
export interface Planned {
	model: ModelFacts;
	args: ResolvedConfig;
	device: string;
	info: DeviceInfo | undefined;
	host: DeviceInfo | undefined;
	size: BatchSize;
	/** Those that the plan is of. */
	options: EngineOptions;
	/** What ranks divide. */
	zero: number;
	plan: NativePlan;
	/** Null: there is one rank. */
	sent: SentBytes | null;
	/** Null: the plan fits, so that there is nothing to change. */
	advice: Advice | null;
	notices: string[];
}

/**
 * Plans the memory of a run, as `arl plan` shows it. Loads nothing; the device need not be in this machine.
 *
 * @throws ArlError where the model's `config.json` or the options cannot be used.
 */
export async function planMemory(args: RowArguments, size: PlanSize = {}): Promise<MemoryPlan> {
	const resolved = resolveArgs({ output_dir: ".", ...args });
	const planned = await planRun(loadNative(), resolved.args, size);
	const { device, info, plan, advice } = planned;
	return {
		device,
		dtype: dtypeOf(planned.args),
		parameters: plan.parameters,
		trainedParameters: plan.trainedParameters,
		tokens: planned.size.maxTokens,
		sequences: planned.size.maxSequences,
		patches: planned.size.maxPatches ?? null,
		images: planned.size.maxImages ?? null,
		evalTokens: planned.size.evalMaxTokens ?? null,
		evalSequences: planned.size.evalMaxSequences ?? null,
		...generatedSize(planned.size),
		categories: plan.categories,
		totalBytes: plan.totalBytes,
		hostCategories: plan.hostCategories,
		hostBytes: plan.hostBytes,
		availableBytes: info?.availableBytes ?? null,
		fits: info === undefined ? null : plan.totalBytes <= info.availableBytes,
		changes: memoryChanges(advice),
		sent: planned.sent,
		notices: [...resolved.notices, ...planned.notices],
	};
}

/** What is generated at a time. */
export function generatedSize({ evalPrompts }: BatchSize): Pick<MemoryPlan, "evalReplies" | "evalPromptTokens"> {
	const prompts = evalPrompts?.[0];
	return { evalReplies: prompts?.length ?? null, evalPromptTokens: prompts?.[0] ?? null };
}

/** Each change by itself. */
export function memoryChanges(advice: Advice | null): MemoryChange[] {
	return (advice?.changes ?? []).map(({ flags, savedBytes, plan: { totalBytes, hostBytes } }) => {
		return { flags, savedBytes, totalBytes, hostBytes };
	});
}

/** Plans, and looks for what would save memory where the plan does not fit. */
export async function planRun(native: Native, asked: AgentTrainingConfig, wanted: PlanSize): Promise<Planned> {
	const found = await modelFolder(asked.model_name_or_path, { weights: false });
	// Who gives patches means images that are trained.
	const images = asked.images === "auto" && (wanted.patches ?? null) !== null ? "train" : asked.images;
	const given = { ...asked, images, model_name_or_path: found.path };
	const model = await readModelFacts(found.path, native);
	const { device, info, notice } = deviceToPlan(given.device, native);
	const { args, notices } = resolveForDevice(given, device);
	const size = { ...batchSize(args, model, wanted), ...imagesSize(native, args, model, wanted) };
	// Each rank has a GPU of its own.
	const share = info && info.availableBytes / (device === "cpu" ? args.nproc_per_node : 1);
	const planner = ofEveryStage(native.planMemory);
	const options = divideToFit(engineOptions(args, device, size), args.zero, planner, share);
	const plan = planner(options);
	const freedom = { packed: args.max_tokens_per_micro_batch !== null, resumed: false };
	const advice = fits(plan, device, info) ? null : advise(options, planner, freedom);
	const unseen =
		model.vision && args.images === "auto"
			? "no images are planned for: rows decide whether they are trained; --images train or --patches N counts them"
			: null;
	const all = [found.notice, notice, unseen].filter((one) => one !== null).concat(notices);
	const sent = worldOf(args) === 1 ? null : sentBytes(native, options, args.gradient_accumulation_steps);
	const zero = options.zero ?? 0;
	return { model, args, device, info, host: hostInfo(native), size, options, zero, plan, sent, advice, notices: all };
}

/** What rank 0 sends in a step; others send as much, but for the last piece of what they divide, and stages of a pipeline. */
function sentBytes(native: Native, options: EngineOptions, rounds: number): SentBytes {
	const sent = native.planTraffic(options, rounds);
	return { ...sent, total: sent.gradients + sent.sums + sent.weights + sent.replicas + sent.tokens };
}

/** The largest micro-batches, trained and evaluated: as they are given, else as the options bound them. */
function batchSize(args: ResolvedConfig, model: ModelFacts, { tokens, sequences }: PlanSize): BatchSize {
	const { max_tokens_per_micro_batch: packed, per_device_train_batch_size: samples } = args;
	const longest = args.max_length ?? model.maxPositionEmbeddings;
	const maxTokens = tokens ?? packed ?? samples * longest;
	const usual = packed === null ? samples : Math.ceil(maxTokens / 64);
	const trained = { maxTokens, maxSequences: Math.min(maxTokens, sequences ?? usual) };
	const evaluated = namesHeldOut(args) ? evaluatedSize(args, longest, trained, tokens ?? null) : {};
	const most = Math.max(maxTokens, evaluated.evalMaxTokens ?? 0);
	if (most > MOST_TOKENS)
		throw new ArlError("ARL_USAGE", `a micro-batch of ${most} tokens is too large`, "Give --tokens.");
	return { ...trained, ...evaluated };
}

/** The images of the largest micro-batch: as they are given, else as options and processor bound them. */
function imagesSize(
	native: Pick<Native, "ImageProcessor">,
	args: ResolvedConfig,
	model: ModelFacts,
	wanted: PlanSize,
): Pick<BatchSize, "maxPatches" | "maxImages"> {
	const { patches = null, pictures = null } = wanted;
	const { maxTokens, maxSequences } = batchSize(args, model, wanted);
	if (!model.vision && args.images === "train")
		throw new ArlError(
			"ARL_CONFIG",
			`${model.path} has no vision tower, and images are planned for`,
			"Leave them out.",
		);
	if (args.images !== "train") return {};
	const maxImages = pictures ?? maxSequences;
	if (patches !== null) return mostImages([{ maxPatches: patches, maxImages }]);
	const { patchSize, mergeSize, maxPixels } = native.ImageProcessor.open(
		model.path,
		args.min_pixels,
		args.max_pixels,
	).info();
	const each = Math.floor(maxPixels / patchSize ** 2);
	return mostImages([{ maxPatches: Math.min(maxImages * each, maxTokens * mergeSize ** 2), maxImages }]);
}

/** The largest micro-batch of held-out rows. Where `tokens` are given, its samples are as long as the trained ones. */
function evaluatedSize(
	args: ResolvedConfig,
	longest: number,
	{ maxTokens, maxSequences }: BatchSize,
	tokens: number | null,
): Omit<BatchSize, "maxTokens" | "maxSequences"> {
	const { max_tokens_per_micro_batch: packed, per_device_eval_batch_size: samples } = args;
	if (packed !== null) {
		const evaluated = { evalMaxTokens: maxTokens, evalMaxSequences: maxSequences };
		return { ...evaluated, ...repliesSize(args, Math.min(longest, maxTokens)) };
	}
	const each = tokens === null ? longest : Math.ceil(tokens / maxSequences);
	return { evalMaxTokens: samples * each, evalMaxSequences: samples, ...repliesSize(args, each) };
}

/**
 * The replies that an evaluation generates at a time, to rows of `tokens` tokens. A prompt and its reply share a row's tokens, and
 * only rows say how: here the prompt has all of them, as reading it takes more memory than generating the reply.
 */
function repliesSize(
	{ eval_generate: rows, per_device_eval_batch_size: samples }: ResolvedConfig,
	tokens: number,
): Pick<BatchSize, "evalPrompts" | "evalMaxNewTokens"> {
	if (rows === 0) return {};
	// Each of the rows may have several replies, so that only the batch bounds them.
	const prompts = new Array<number>(Math.min(samples, MOST_REPLIES)).fill(tokens);
	return { evalPrompts: [prompts], evalMaxNewTokens: SPARE_TOKENS };
}

/** Whether the plan fits the device; where nothing is known of it, whether it fits the smallest GPU. */
function fits(plan: NativePlan, device: string, info: DeviceInfo | undefined): boolean {
	const room = info === undefined ? roomOf(GPU_SIZES[0]) : info.availableBytes;
	return plan.totalBytes <= room || (device === "cpu" && info === undefined);
}

/** What a GPU of `gigabytes` leaves to a run. */
export function roomOf(gigabytes: number): number {
	return gigabytes * GB - CONTEXT_BYTES;
}
