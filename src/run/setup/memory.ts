/** The memory of a run: its plan in words, whether it fits, and what to change if it does not. Knows nothing of rows. */
import { ArlError } from "../../errors.js";
import type { DeviceInfo, EngineOptions, MemoryPlan } from "../../native.js";
import { bytesToTenth } from "../../report/format.js";

/** Bytes of CUDA's own context on a GPU, which no plan contains; rounded up. */
export const CONTEXT_BYTES = 2 ** 30;

/** The fewest rows of logits at a time that keep a device busy: the engine chooses no fewer. */
const SMALL_CHUNK = 256;

/** Plans the memory of an engine. */
export type Planner = (options: EngineOptions) => MemoryPlan;

/** A change of options that saves memory. */
export interface Change {
	/** As on the command line. */
	flags: string;
	/** Bytes that it saves on the device. */
	savedBytes: number;
	/** The plan with it. */
	plan: MemoryPlan;
}

/** Changes that save memory. */
export interface Advice {
	/** Each by itself, the one that saves most first. */
	changes: Change[];
	/** The plan with all of them; null if there are fewer than two. */
	together: MemoryPlan | null;
}

/** Which options may change at all. */
export interface Freedom {
	/** Micro-batches are counted in tokens. */
	packed: boolean;
	/** The run is resumed: its arithmetic and its micro-batches stay as they are. */
	resumed: boolean;
}

/** Finds what each change would save, by planning with it. */
export function advise(options: EngineOptions, plan: Planner, freedom: Freedom): Advice {
	const now = plan(options).totalBytes;
	const useful: { flags: string; other: Partial<EngineOptions> }[] = [];
	const changes: Change[] = [];
	for (const { flags, other } of possibleChanges(options, freedom)) {
		const planned = plan({ ...options, ...other });
		const savedBytes = now - planned.totalBytes;
		if (savedBytes <= 0) continue;
		useful.push({ flags, other });
		changes.push({ flags, savedBytes, plan: planned });
	}
	changes.sort((a, b) => b.savedBytes - a.savedBytes);
	const all: EngineOptions = Object.assign({ ...options }, ...useful.map(({ other }) => other));
	return { changes, together: changes.length > 1 ? plan(all) : null };
}

/**
 * The plan of the rank that needs most, as `plan` makes them one by one: stages of a pipeline have different layers, and the first
 * one the embedding, the last one the head. Elsewhere the first rank needs as much as any.
 */
export function ofEveryStage(plan: Planner): Planner {
	return (options) => {
		const { dataParallel = 1, cpSize = 1, tpSize = 1, ppSize = 1 } = options;
		if (ppSize === 1) return plan(options);
		const stage = dataParallel * cpSize * tpSize;
		const plans = Array.from({ length: ppSize }, (_, place) => plan({ ...options, rank: place * stage }));
		return plans.reduce((most, one) => (one.totalBytes > most.totalBytes ? one : most));
	};
}

/**
 * The options with weights divided among ranks too, where the plan does not fit without that. `asked`: the option `zero`; `room`:
 * bytes that a rank may take, 0 or undefined where that is not known. Ranks that divide a model already keep their weights whole.
 */
export function divideToFit(
	options: EngineOptions,
	asked: "auto" | number,
	plan: Planner,
	room: number | undefined,
): EngineOptions {
	if (asked !== "auto" || (options.zero ?? 0) === 0 || !room || cutsModel(options)) return options;
	const needed = plan(options).totalBytes;
	const divided = { ...options, zero: 3 };
	return needed > room && plan(divided).totalBytes < needed ? divided : options;
}

/** Whether ranks divide weights by what they are: heads and columns, experts, layers. */
function cutsModel({ tpSize = 1, epSize = 1, ppSize = 1 }: EngineOptions): boolean {
	return tpSize * epSize * ppSize > 1;
}

function possibleChanges(options: EngineOptions, freedom: Freedom) {
	const found: { flags: string; other: Partial<EngineOptions> }[] = [];
	if (options.recompute !== "block")
		found.push({ flags: "--gradient_checkpointing block", other: { recompute: "block" } });
	if (options.device !== "cpu") {
		if (!options.activationOffloading)
			found.push({ flags: "--activation_offloading", other: { activationOffloading: true } });
		if (!options.optimizerOffload) found.push({ flags: "--optimizer_offload", other: { optimizerOffload: true } });
		if (options.attention !== "own") found.push({ flags: "--attention own", other: { attention: "own" } });
	}
	const { dataParallel: ranks = 1, cpSize = 1, zero = 0 } = options;
	if (ranks * cpSize > 1 && zero < 3 && !cutsModel(options)) found.push({ flags: "--zero 3", other: { zero: 3 } });
	const { evalMaxTokens = 0, evalMaxSequences = 0 } = options;
	if (evalMaxSequences > 1 && !freedom.packed) {
		const sequences = Math.ceil(evalMaxSequences / 2);
		const tokens = Math.ceil((evalMaxTokens * sequences) / evalMaxSequences);
		found.push({
			flags: `--per_device_eval_batch_size ${sequences}`,
			other: { evalMaxTokens: tokens, evalMaxSequences: sequences, ...fewerPrompts(options, sequences) },
		});
	}
	if (freedom.resumed) return found;
	if ((options.lossSeqChunkSize ?? Number.POSITIVE_INFINITY) > SMALL_CHUNK)
		found.push({ flags: `--loss_seq_chunk_size ${SMALL_CHUNK}`, other: { lossSeqChunkSize: SMALL_CHUNK } });
	if (options.dtype !== "bf16")
		found.push({ flags: options.dtype === "f16" ? "--fp16 false --bf16" : "--bf16", other: { dtype: "bf16" } });
	else if (!options.stochasticRounding)
		found.push({ flags: "--bf16_stochastic_round", other: { stochasticRounding: true } });
	if (!options.bf16Moments) found.push({ flags: "--bf16_moments", other: { bf16Moments: true } });
	const { maxTokens, maxSequences } = options;
	if (maxTokens === 1) return found;
	const half = Math.ceil(maxTokens / 2);
	if (freedom.packed || maxSequences === 1) {
		const name = freedom.packed ? "max_tokens_per_micro_batch" : "max_length";
		const mostEvaluated = freedom.packed ? half : half * evalMaxSequences;
		const evaluated = evalMaxTokens > 0 ? { evalMaxTokens: Math.min(evalMaxTokens, mostEvaluated) } : {};
		const other = {
			maxTokens: half,
			maxSequences: Math.ceil(maxSequences / 2),
			...halfTheImages(options),
			...evaluated,
		};
		found.push({ flags: `--${name} ${half}`, other });
	} else {
		const sequences = Math.ceil(maxSequences / 2);
		const tokens = Math.ceil((maxTokens * sequences) / maxSequences);
		const other = { maxTokens: tokens, maxSequences: sequences, ...halfTheImages(options) };
		found.push({ flags: `--per_device_train_batch_size ${sequences}`, other });
	}
	return found;
}

/** The images of half a micro-batch. */
function halfTheImages({ maxPatches, maxImages = 0 }: EngineOptions): Partial<EngineOptions> {
	return maxPatches === undefined ? {} : { maxPatches: Math.ceil(maxPatches / 2), maxImages: Math.ceil(maxImages / 2) };
}

/** The prompts of an evaluation, so many at a time. */
function fewerPrompts({ evalPrompts }: EngineOptions, sequences: number): Partial<EngineOptions> {
	const lengths = evalPrompts?.flat() ?? [];
	const batches = Math.ceil(lengths.length / sequences);
	const batch = (_: unknown, i: number) => lengths.slice(i * sequences, (i + 1) * sequences);
	return batches === 0 ? {} : { evalPrompts: Array.from({ length: batches }, batch) };
}

/** Categories in words. */
function categoriesText(categories: MemoryPlan["categories"]): string {
	return categories.map(({ name, bytes }) => `${name} ${bytesToTenth(bytes)}`).join(", ");
}

/** A line for each change, and one for all of them. `room`: available bytes, if known. */
function adviceText({ changes, together }: Advice, room: number | null): string {
	const fits = (plan: MemoryPlan) => (room === null ? "" : plan.totalBytes <= room ? ", which fits" : "");
	const inHost = (plan: MemoryPlan) =>
		plan.hostBytes > 0 ? `, and ${bytesToTenth(plan.hostBytes)} in host memory` : "";
	const lines = changes.map(({ flags, savedBytes, plan }) => {
		const needed = `it then needs ${bytesToTenth(plan.totalBytes)}${inHost(plan)}${fits(plan)}`;
		return `${flags} saves ${bytesToTenth(savedBytes)}: ${needed}.`;
	});
	if (together !== null) {
		const enough = room !== null && together.totalBytes > room ? ", which is still too much" : fits(together);
		lines.push(`All of these together: ${bytesToTenth(together.totalBytes)}${inHost(together)}${enough}.`);
	}
	if (lines.some((line) => line.includes("per_device_train_batch_size")))
		lines.push("Raise gradient_accumulation_steps as per_device_train_batch_size falls, and each step is the same.");
	return lines.join("\n") || "Take a smaller model, or a device with more memory.";
}

/** Where a run's memory comes from; undefined: not known. */
export interface Memory {
	device: DeviceInfo | undefined;
	host: DeviceInfo | undefined;
}

/**
 * Checks that the planned memory is available. Returns a line about it.
 *
 * @throws ArlError `ARL_OOM` with the plan and what to change.
 */
export function checkMemory(plan: MemoryPlan, { device, host }: Memory, advice: () => Advice): string {
	const named = plan.categories.length > 0 ? `: ${categoriesText(plan.categories)}` : "";
	const known = device !== undefined && device.availableBytes > 0;
	if (known && plan.totalBytes > device.availableBytes) throw tooSmall(plan, device, advice());
	const found = known ? `, ${bytesToTenth(device.availableBytes)} available on ${device.name}` : "";
	const inDevice = `${bytesToTenth(plan.totalBytes)} planned${found}${named}`;
	if (plan.hostBytes === 0) return inDevice;
	const hostKnown = host !== undefined && host.availableBytes > 0;
	// A GPU's host memory is pinned as the engine opens, and only that attempt shows how much there is: what the system calls
	// available starts far too low in virtual machines whose memory grows with its use. The CPU's is taken as it is used.
	const pinned = device !== undefined && device.device !== "cpu";
	if (hostKnown && plan.hostBytes > (pinned ? host.memoryBytes : host.availableBytes)) {
		throw hostTooSmall(plan, pinned ? `the machine has ${bytesToTenth(host.memoryBytes)}` : availableIn(host));
	}
	const left = hostKnown ? `, ${bytesToTenth(host.availableBytes)} available` : "";
	const inHost = `${bytesToTenth(plan.hostBytes)} in host memory${left}: ${categoriesText(plan.hostCategories)}`;
	return `${inDevice}; ${inHost}`;
}

function tooSmall(plan: MemoryPlan, device: DeviceInfo, advice: Advice): ArlError {
	const room = device.availableBytes;
	const lines = [
		`the run needs ${bytesToTenth(plan.totalBytes)} of memory, and ${device.name} has ${bytesToTenth(room)} available`,
		categoriesText(plan.categories),
	];
	const hints: string[] = [];
	const onGpu = device.device !== "cpu";
	if (plan.totalBytes <= device.memoryBytes - (onGpu ? CONTEXT_BYTES : 0)) {
		const held = bytesToTenth(device.memoryBytes - room);
		lines.push(`its memory of ${bytesToTenth(device.memoryBytes)} would be enough, but ${held} are in use`);
		hints.push(`End the programs that use it${onGpu ? " (`nvidia-smi` shows them)" : ""}, or:`);
	}
	return new ArlError("ARL_OOM", lines.join("\n"), [...hints, adviceText(advice, room)].join("\n"));
}

function availableIn(host: DeviceInfo): string {
	return `${bytesToTenth(host.availableBytes)} are available`;
}

function hostTooSmall(plan: MemoryPlan, room: string): ArlError {
	const message = `the run keeps ${bytesToTenth(plan.hostBytes)} in host memory, and ${room}`;
	const hints = plan.hostCategories.map(({ name, bytes }) => {
		const option = name === "activations" ? "activation_offloading" : "optimizer_offload";
		return `Without --${option} ${name} (${bytesToTenth(bytes)}) stay on the GPU.`;
	});
	return new ArlError("ARL_OOM", `${message}\n${categoriesText(plan.hostCategories)}`, hints.join("\n"));
}

/**
 * Adds the plan, and what to change, to an `ARL_OOM` of the engine; other errors are returned as they are. `where`: what was
 * being done; `left`: what remains of the run.
 */
export function withPlan(error: ArlError, plan: MemoryPlan, advice: () => Advice, where = "", left = ""): ArlError {
	if (error.code !== "ARL_OOM") return error;
	const lines = [
		`${where}${error.message}`,
		`planned were ${bytesToTenth(plan.totalBytes)}: ${categoriesText(plan.categories)}`,
	];
	if (plan.hostBytes > 0)
		lines.push(`and ${bytesToTenth(plan.hostBytes)} in host memory: ${categoriesText(plan.hostCategories)}`);
	const hints = [left, error.hint, adviceText(advice(), null)].filter((hint) => hint !== "");
	return new ArlError("ARL_OOM", lines.join("\n"), hints.join("\n"), { cause: error });
}
