/** `arl plan`: shows the memory that a run takes, by category. Reads no rows and no weights, and needs no GPU. */
import pc from "picocolors";
import {
	GPU_SIZES,
	generatedSize,
	MOST_TOKENS,
	memoryChanges,
	type Planned,
	planRun,
	roomOf,
	type SentBytes,
} from "../api/plan-memory.js";
import { planTime } from "../api/plan-time.js";
import { integerOrNone } from "../config/index.js";
import { meshText, worldOf } from "../config/mesh.js";
import { type DeviceInfo, loadNative, type MemoryPlan, type Native } from "../native.js";
import { bytes, count, jsonLine, percent } from "../report/index.js";
import { wantsColor } from "../report/terminal.js";
import { adaptedText } from "../run/setup/lora.js";
import { CONTEXT_BYTES } from "../run/setup/memory.js";
import { dtypeOf, zeroText } from "../run/setup/options.js";
import { JSON_FLAG } from "./command.js";
import { timeJson, timeText } from "./plan-time.js";
import { resolveCommand, withOptions } from "./resolve.js";

export const COMMAND = withOptions({
	name: "arl plan",
	usage: "[CONFIG] [--tokens N] [--OPTION VALUE ...]",
	about: `Shows the memory that a run takes, by category, and what would save some:
  arl plan --model_name_or_path DIR --device cuda --max_length 4096 --per_device_train_batch_size 1

With \`--world N\` it plans for each of N ranks, and shows what a rank sends in a step; with pp_size for the stage that needs most:
  arl plan --model_name_or_path DIR --device cpu --world 4 --zero 2
  arl plan --model_name_or_path DIR --device cpu --world 4 --tp_size 2

Takes the options of \`arl train\` (\`arl train --help\`); those on device, batch, precision and memory count, and
with eval_file or eval_split those on evaluation. The model's folder needs no more than config.json. \`--device cuda\` plans for a GPU even on a machine without one.`,
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
		patches: integerOrNone({
			min: 1,
			max: MOST_TOKENS,
			description:
				"Patches of the images of that micro-batch (`height / patch_size * width / patch_size` each); none: with `images train` an image of max_pixels a sample, as far as the tokens suffice, else no images.",
		}),
		pictures: integerOrNone({
			min: 1,
			max: MOST_TOKENS,
			description: "Images of that micro-batch; none: one a sample.",
		}),
		world: integerOrNone({
			min: 1,
			max: 65536,
			description: "Ranks that train together; none: dp_size times tp_size, cp_size and pp_size.",
		}),
		nodes: integerOrNone({
			min: 1,
			max: 65536,
			description:
				"Show also what a model of time says of the ranks as GPUs (H100) on so many nodes: computation, communication that does not hide behind it, and the fastest meshes. No measurement.",
		}),
		json: JSON_FLAG,
	},
});

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const found = await resolveCommand(COMMAND, words, { output_dir: "." }, ({ world }) => world);
	if (found === null) return 0;
	const { resolved, flags } = found;
	const { tokens, sequences, patches, pictures, nodes } = flags;
	const native = core();
	const planned = await planRun(native, resolved.args, { tokens, sequences, patches, pictures });
	const { args, options, model } = planned;
	const time = nodes === null ? null : planTime({ native, args, options, modelType: model.modelType, nodes });
	for (const line of [...resolved.notices, ...planned.notices]) process.stderr.write(`${line}\n`);
	if (flags.json) process.stdout.write(`${jsonLine({ ...asJson(planned), time: time && timeJson(time) })}\n`);
	else process.stdout.write(`${asText(planned)}${time === null ? "" : timeText(time)}`);
	return 0;
}

/** The smallest GPU that the plan fits, in GB; null: none of them. */
function smallestGpu(plan: MemoryPlan): number | null {
	return GPU_SIZES.find((gigabytes) => plan.totalBytes <= roomOf(gigabytes)) ?? null;
}

function asJson(planned: Planned): Record<string, unknown> {
	const { model, args, device, info, host, size, plan, advice } = planned;
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
		trainedParameters: plan.trainedParameters,
		flopsPerToken: plan.flopsPerToken,
		attentionFlops: plan.attentionFlops,
		adapted: plan.adapted ?? null,
		device,
		dtype: dtypeOf(args),
		bf16_stochastic_round: args.bf16_stochastic_round,
		bf16_moments: args.bf16_moments,
		gradient_checkpointing: args.gradient_checkpointing,
		activation_offloading: args.activation_offloading,
		optimizer_offload: args.optimizer_offload,
		world: worldOf(args),
		dp_size: args.dp_size,
		dp_replicate_size: args.dp_replicate_size,
		tp_size: args.tp_size,
		cp_size: args.cp_size,
		ep_size: args.ep_size,
		pp_size: args.pp_size,
		zero: planned.zero,
		tokens: size.maxTokens,
		sequences: size.maxSequences,
		patches: size.maxPatches ?? null,
		images: size.maxImages ?? null,
		evalTokens: size.evalMaxTokens ?? null,
		evalSequences: size.evalMaxSequences ?? null,
		...generatedSize(size),
		categories: plan.categories,
		totalBytes: plan.totalBytes,
		hostCategories: plan.hostCategories,
		hostBytes: plan.hostBytes,
		sent: planned.sent,
		deviceMemory: known(info, plan.totalBytes),
		hostMemory: known(host, plan.hostBytes),
		contextBytes: CONTEXT_BYTES,
		gpus:
			device === "cpu" ? [] : GPU_SIZES.map((gigabytes) => ({ gigabytes, fits: plan.totalBytes <= roomOf(gigabytes) })),
		changes: memoryChanges(advice),
		together: advice?.together
			? { totalBytes: advice.together.totalBytes, hostBytes: advice.together.hostBytes }
			: null,
	};
}

const gib = (value: number) => (value / 2 ** 30).toFixed(2);
const mib = (value: number) => (value / 2 ** 20).toFixed(2);
const grouped = (value: number) => value.toLocaleString("en-US");

function asText(planned: Planned): string {
	const { model, args, device, info, host, size, plan } = planned;
	const { bold } = pc.createColors(wantsColor(process.stdout));
	const { evalReplies, evalPromptTokens } = generatedSize(size);
	const several = worldOf(args) > 1;
	const where = info === undefined ? device : device === "cpu" ? info.name : `${device} (${info.name})`;
	const kept = [
		dtypeOf(args),
		...(args.bf16_stochastic_round ? ["bf16_stochastic_round"] : []),
		...(args.bf16_moments ? ["bf16_moments"] : []),
		`gradient_checkpointing ${args.gradient_checkpointing}`,
		...(args.activation_offloading ? ["activation_offloading"] : []),
		...(args.optimizer_offload ? ["optimizer_offload"] : []),
	];
	const lines = [
		`${model.path}: ${model.modelType}, ${count(plan.parameters)} parameters (${grouped(plan.parameters)})`,
		`training on ${where}: ${kept.join(", ")}; micro-batches of up to ${batchText(size.maxTokens, size.maxSequences)}${imagesText(size)}`,
		...(size.evalMaxTokens === undefined
			? []
			: [`evaluation of up to ${batchText(size.evalMaxTokens, size.evalMaxSequences ?? 1)} at a time`]),
		...(evalReplies === null || evalPromptTokens === null ? [] : [repliesText(evalReplies, evalPromptTokens)]),
		"",
		bold(heading(several ? "memory of each rank" : device === "cpu" ? "memory" : "GPU memory")),
		...table(plan.categories, plan.totalBytes),
	];
	const divided = [meshText(args), zeroText(args, planned.zero)].filter((line) => line !== null);
	lines.splice(2, 0, ...divided);
	const adapted = adaptedText(plan);
	if (adapted !== null) lines.splice(1, 0, adapted);
	if (plan.hostBytes > 0) {
		lines.push("", bold(heading("host memory")), ...table(plan.hostCategories, plan.hostBytes));
	}
	if (planned.sent !== null)
		lines.push("", bold(heading("sent by a rank in a step", "MiB")), ...sentTable(planned.sent));
	lines.push("");
	if (info !== undefined) lines.push(fitsText(plan.totalBytes, info));
	if (plan.hostBytes > 0 && host !== undefined) lines.push(`host memory: ${fitsText(plan.hostBytes, host)}`);
	if (device !== "cpu") lines.push(...gpuLines(plan));
	return `${[...lines, ...adviceLines(planned)].join("\n")}\n`;
}

function batchText(tokens: number, sequences: number): string {
	return `${grouped(tokens)} tokens in ${sequences === 1 ? "1 sequence" : `${grouped(sequences)} sequences`}`;
}

function imagesText({ maxPatches, maxImages = 0 }: Planned["size"]): string {
	if (maxPatches === undefined) return "";
	return ` with ${maxImages === 1 ? "1 image" : `${grouped(maxImages)} images`} of ${grouped(maxPatches)} patches together`;
}

function repliesText(replies: number, tokens: number): string {
	const many = replies === 1 ? "1 row" : `${grouped(replies)} rows`;
	return `generated replies to up to ${many} of ${grouped(tokens)} tokens at a time`;
}

function heading(name: string, unit = "GiB"): string {
	return `${name.padEnd(26)} ${unit.padStart(8)} ${"share".padStart(9)}`;
}

function table(categories: MemoryPlan["categories"], total: number, text = gib): string[] {
	const row = (name: string, size: number) =>
		`  ${name.padEnd(24)} ${text(size).padStart(8)} ${percent(size / total).padStart(9)}`;
	return [...categories.map(({ name, bytes: size }) => row(name, size)), row("total", total)];
}

function sentTable({ total, ...parts }: SentBytes): string[] {
	const names = {
		gradients: "gradients",
		sums: "sums of gradients",
		weights: "weights",
		replicas: "weights to replicas",
		tokens: "activations",
	} as const;
	const categories = Object.entries(parts).map(([name, size]) => ({
		name: names[name as keyof typeof names],
		bytes: size,
	}));
	const sent = categories.filter((category) => category.bytes > 0);
	return table(sent, total, mib);
}

function fitsText(needed: number, { availableBytes, memoryBytes }: DeviceInfo): string {
	const room = `${bytes(availableBytes)} of ${bytes(memoryBytes)} available`;
	const over = needed - availableBytes;
	return over <= 0 ? `fits this machine: ${room}` : `does not fit this machine, ${bytes(over)} too much: ${room}`;
}

function gpuLines(plan: MemoryPlan): string[] {
	const sizes = GPU_SIZES.map((gigabytes) => {
		const over = plan.totalBytes - roomOf(gigabytes);
		return `  ${String(gigabytes).padStart(3)} GB  ${over <= 0 ? "fits" : `does not fit: ${bytes(over)} too much`}`;
	});
	return [`GPUs by memory (GB of 10^9 bytes, of which CUDA's own context takes ${bytes(CONTEXT_BYTES)}):`, ...sizes];
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
