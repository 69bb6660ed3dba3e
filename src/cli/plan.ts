/** `arl plan`: the memory that a run takes, by category; no rows and no weights are read, and no GPU is needed. */
import pc from "picocolors";
import { integerOrNone } from "../config/index.js";
import { deviceToPlan, hostInfo } from "../device/index.js";
import { ArlError } from "../errors.js";
import { type DeviceInfo, loadNative, type MemoryPlan, type Native } from "../native.js";
import { bytes, count, jsonLine, percent } from "../report/index.js";
import { wantsColor } from "../report/terminal.js";
import { type Advice, advise, CONTEXT_BYTES } from "../run/setup/memory.js";
import { type ModelFacts, readModelFacts } from "../run/setup/model.js";
import { type BatchSize, dtypeOf, engineOptions, type ResolvedConfig, resolveForDevice } from "../run/setup/options.js";
import { JSON_FLAG } from "./command.js";
import { resolveCommand, withOptions } from "./resolve.js";

/** Memory of GPUs that there are, in GB as their makers count. */
const GPU_SIZES = [24, 40, 48, 80, 141] as const;
const GB = 1e9;
/** The most tokens that a plan is made for: what the engine's counts of them hold. */
const MOST_TOKENS = 2 ** 31 - 1;

const COMMAND = withOptions({
	name: "arl plan",
	usage: "[CONFIG] [--tokens N] [--OPTION VALUE ...]",
	about: `Shows the memory that a run takes, by category, and what would save some:
  arl plan --model_name_or_path DIR --device cuda --max_length 4096 --per_device_train_batch_size 1

Takes the options of \`arl train\` (\`arl train --help\`); those on device, batch, precision and memory count. The model's folder
needs no more than config.json. \`--device cuda\` plans for a GPU even on a machine without one.`,
	flags: {
		tokens: integerOrNone({
			min: 1,
			max: MOST_TOKENS,
			description:
				"Tokens of the largest micro-batch; none: max_tokens_per_micro_batch if it is given, else per_device_train_batch_size times max_length, or times the longest sample that the model takes.",
		}),
		sequences: integerOrNone({
			min: 1,
			max: MOST_TOKENS,
			description:
				"Samples of that micro-batch; none: per_device_train_batch_size, and with packing one for each 64 tokens.",
		}),
		json: JSON_FLAG,
	},
});

/** All there is to say. */
interface Planned {
	model: ModelFacts;
	args: ResolvedConfig;
	device: string;
	info: DeviceInfo | undefined;
	host: DeviceInfo | undefined;
	size: BatchSize;
	plan: MemoryPlan;
	/** Null: the plan fits, so that there is nothing to change. */
	advice: Advice | null;
}

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const found = await resolveCommand(COMMAND, words, { output_dir: "." });
	if (found === null) return 0;
	const { resolved, flags } = found;
	const native = core();
	const model = await readModelFacts(resolved.args.model_name_or_path, native);
	const { device, info, notice } = deviceToPlan(resolved.args.device, native);
	const { args, notices } = resolveForDevice(resolved.args, device);
	for (const line of [...resolved.notices, ...(notice === null ? [] : [notice]), ...notices])
		process.stderr.write(`${line}\n`);
	const size = batchSize(args, model, flags.tokens, flags.sequences);
	const options = engineOptions(args, device, size);
	const plan = native.planMemory(options);
	const freedom = { packed: args.max_tokens_per_micro_batch !== null, resumed: false };
	const advice = fits(plan, device, info) ? null : advise(options, native.planMemory, freedom);
	const planned = { model, args, device, info, host: hostInfo(native), size, plan, advice };
	process.stdout.write(flags.json ? `${jsonLine(asJson(planned))}\n` : asText(planned));
	return 0;
}

/** The largest micro-batch: as it is given, else as the options bound it. */
function batchSize(
	args: ResolvedConfig,
	model: ModelFacts,
	tokens: number | null,
	sequences: number | null,
): BatchSize {
	const { max_tokens_per_micro_batch: packed, per_device_train_batch_size: samples } = args;
	const longest = args.max_length ?? model.maxPositionEmbeddings;
	const bound = packed ?? (longest === null ? null : samples * longest);
	const maxTokens = tokens ?? bound;
	if (maxTokens === null)
		throw new ArlError("ARL_USAGE", "how long samples are is not known", "Give --tokens, or --max_length.");
	if (maxTokens > MOST_TOKENS)
		throw new ArlError("ARL_USAGE", `a micro-batch of ${maxTokens} tokens is too large`, "Give --tokens.");
	const usual = packed === null ? samples : Math.ceil(maxTokens / 64);
	return { maxTokens, maxSequences: Math.min(maxTokens, sequences ?? usual) };
}

/** Whether the plan fits the device; where nothing is known of it, whether it fits the smallest GPU. */
function fits(plan: MemoryPlan, device: string, info: DeviceInfo | undefined): boolean {
	const room = info === undefined ? roomOf(GPU_SIZES[0]) : info.availableBytes;
	return plan.totalBytes <= room || (device === "cpu" && info === undefined);
}

/** What a GPU of `gigabytes` leaves to a run. */
function roomOf(gigabytes: number): number {
	return gigabytes * GB - CONTEXT_BYTES;
}

/** The smallest GPU that the plan fits, in GB; null: none of them. */
function smallestGpu(plan: MemoryPlan): number | null {
	return GPU_SIZES.find((gigabytes) => plan.totalBytes <= roomOf(gigabytes)) ?? null;
}

function asJson({ model, args, device, info, host, size, plan, advice }: Planned): Record<string, unknown> {
	const known = (place: DeviceInfo | undefined, needed: number) =>
		place === undefined
			? null
			: {
					name: place.name,
					memoryBytes: place.memoryBytes,
					availableBytes: place.availableBytes,
					fits: needed <= place.availableBytes,
				};
	return {
		model: model.path,
		modelType: model.modelType,
		parameters: plan.parameters,
		device,
		dtype: dtypeOf(args),
		bf16_stochastic_round: args.bf16_stochastic_round,
		bf16_moments: args.bf16_moments,
		gradient_checkpointing: args.gradient_checkpointing,
		activation_offloading: args.activation_offloading,
		optimizer_offload: args.optimizer_offload,
		tokens: size.maxTokens,
		sequences: size.maxSequences,
		categories: plan.categories,
		totalBytes: plan.totalBytes,
		hostCategories: plan.hostCategories,
		hostBytes: plan.hostBytes,
		deviceMemory: known(info, plan.totalBytes),
		hostMemory: known(host, plan.hostBytes),
		contextBytes: CONTEXT_BYTES,
		gpus:
			device === "cpu" ? [] : GPU_SIZES.map((gigabytes) => ({ gigabytes, fits: plan.totalBytes <= roomOf(gigabytes) })),
		changes: (advice?.changes ?? []).map(({ flags, savedBytes, plan: { totalBytes, hostBytes } }) => ({
			flags,
			savedBytes,
			totalBytes,
			hostBytes,
		})),
		together: advice?.together
			? { totalBytes: advice.together.totalBytes, hostBytes: advice.together.hostBytes }
			: null,
	};
}

const gib = (value: number) => (value / 2 ** 30).toFixed(2);
const grouped = (value: number) => value.toLocaleString("en-US");

function asText(planned: Planned): string {
	const { model, args, device, info, host, size, plan } = planned;
	const { bold } = pc.createColors(wantsColor(process.stdout));
	const where = info === undefined ? device : device === "cpu" ? info.name : `${device} (${info.name})`;
	const kept = [
		dtypeOf(args),
		...(args.bf16_stochastic_round ? ["bf16_stochastic_round"] : []),
		...(args.bf16_moments ? ["bf16_moments"] : []),
		`gradient_checkpointing ${args.gradient_checkpointing}`,
		...(args.activation_offloading ? ["activation_offloading"] : []),
		...(args.optimizer_offload ? ["optimizer_offload"] : []),
	];
	const samples = size.maxSequences === 1 ? "1 sequence" : `${grouped(size.maxSequences)} sequences`;
	const lines = [
		`${model.path}: ${model.modelType}, ${count(plan.parameters)} parameters (${grouped(plan.parameters)})`,
		`training on ${where}: ${kept.join(", ")}; micro-batches of up to ${grouped(size.maxTokens)} tokens in ${samples}`,
		"",
		bold(heading(device === "cpu" ? "memory" : "GPU memory")),
		...table(plan.categories, plan.totalBytes),
	];
	if (plan.hostBytes > 0) {
		lines.push("", bold(heading("host memory")), ...table(plan.hostCategories, plan.hostBytes));
	}
	lines.push("");
	if (info !== undefined) lines.push(fitsText(plan.totalBytes, info));
	if (plan.hostBytes > 0 && host !== undefined) lines.push(`host memory: ${fitsText(plan.hostBytes, host)}`);
	if (device !== "cpu") lines.push(...gpuLines(plan));
	return `${[...lines, ...adviceLines(planned)].join("\n")}\n`;
}

function heading(name: string): string {
	return `${name.padEnd(26)} ${"GiB".padStart(8)} ${"share".padStart(9)}`;
}

function table(categories: MemoryPlan["categories"], total: number): string[] {
	const row = (name: string, size: number) =>
		`  ${name.padEnd(24)} ${gib(size).padStart(8)} ${percent(size / total).padStart(9)}`;
	return [...categories.map(({ name, bytes: size }) => row(name, size)), row("total", total)];
}

function fitsText(needed: number, { availableBytes, memoryBytes }: DeviceInfo): string {
	const there = `${bytes(availableBytes)} of ${bytes(memoryBytes)} available`;
	const over = needed - availableBytes;
	return over <= 0 ? `fits this machine: ${there}` : `does not fit this machine, ${bytes(over)} too much: ${there}`;
}

function gpuLines(plan: MemoryPlan): string[] {
	const sizes = GPU_SIZES.map((gigabytes) => {
		const over = plan.totalBytes - roomOf(gigabytes);
		return `  ${String(gigabytes).padStart(3)} GB  ${over <= 0 ? "fits" : `does not fit: ${bytes(over)} too much`}`;
	});
	return [
		`GPUs by memory (GB of 10^9 bytes, of which ${bytes(CONTEXT_BYTES)} is left to CUDA's own context):`,
		...sizes,
	];
}

function adviceLines({ device, advice }: Planned): string[] {
	if (advice === null || advice.changes.length === 0) return [];
	const row = (flags: string, saved: string, plan: MemoryPlan) => {
		const gpu = smallestGpu(plan);
		const from = device === "cpu" ? "" : `  ${gpu === null ? "none of these" : `${gpu} GB`}`.padEnd(15);
		const host = plan.hostBytes > 0 ? `  and ${gib(plan.hostBytes)} GiB in host memory` : "";
		return `  ${flags.padEnd(36)} ${saved.padStart(9)} ${gib(plan.totalBytes).padStart(9)}${from}${host}`.trimEnd();
	};
	const head = `${"what to change".padEnd(38)} saves GiB total GiB${device === "cpu" ? "" : "  fits from"}`;
	const each = advice.changes.map(({ flags, savedBytes, plan }) => row(flags, gib(savedBytes), plan));
	return ["", head, ...each, ...(advice.together ? [row("all of these", "", advice.together)] : [])];
}
