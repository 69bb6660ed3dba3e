/**
 * What is checked before anything is computed, so that what can fail fails in the first seconds and with nothing written.
 * Each check returns one line of what it found, or throws.
 */
import { constants } from "node:fs";
import { access, readdir, realpath, stat, statfs } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import type { AgentTrainingConfig } from "../config/schema.js";
import { ArlError, toArlError } from "../errors.js";
import type { EngineInfo, NativeTextEncoder, TextInfo } from "../native.js";
import type { ModelFolder } from "./model.js";

/** Bytes as people read them. */
export function formatBytes(bytes: number): string {
	const units = ["B", "KiB", "MiB", "GiB", "TiB"];
	let value = bytes;
	let unit = 0;
	while (value >= 1024 && unit < units.length - 1) {
		value /= 1024;
		unit += 1;
	}
	return `${unit === 0 ? value : value.toFixed(value < 10 ? 2 : 1)} ${units[unit]}`;
}

/** The tokenizer fits the model, and the token that ends a reply exists. */
export function checkTokenizer(model: ModelFolder, text: TextInfo): string {
	if (text.vocabSize > model.vocabSize) {
		throw new ArlError(
			"ARL_TEXT",
			`${model.path}: the tokenizer makes ids up to ${text.vocabSize - 1}, and the model's vocab_size is ${model.vocabSize}`,
			"The tokenizer belongs to another model: copy the files that came with these weights.",
		);
	}
	const outside = text.stopIds.filter((id) => id < 0 || id >= model.vocabSize);
	if (text.stopIds.length === 0 || outside.length > 0) {
		throw new ArlError(
			"ARL_TEXT",
			text.stopIds.length === 0
				? `${model.path}: the template and tokenizer name no token that ends a reply`
				: `${model.path}: the token that ends a reply (id ${outside.join(", ")}) is outside the model's vocabulary of ${model.vocabSize}`,
			"Check eos_token in tokenizer_config.json; for Qwen it is <|im_end|>.",
		);
	}
	return `${text.vocabSize} ids of ${model.vocabSize}, template from ${text.templateSource}, a reply ends with id ${text.stopIds.join(" or ")}`;
}

/** A warning where none of the rows trains the token that ends a reply; null where one does, or none can tell. */
export function stopTokenWarning(encoder: NativeTextEncoder, stopIds: number[], rows: Uint8Array[]): string | null {
	let seen = 0;
	for (const row of rows) {
		const encoded = tryEncode(encoder, row);
		const last = encoded?.spans.at(-1);
		if (!encoded || !last) continue;
		seen += 1;
		if (stopIds.includes(encoded.inputIds[last.last] ?? -1)) return null;
	}
	if (seen === 0) return null;
	return `in none of the first ${seen} rows the token that ends a reply (id ${stopIds.join(" or ")}) is trained: the model will not learn to stop`;
}

function tryEncode(encoder: NativeTextEncoder, row: Uint8Array) {
	try {
		return encoder.encode(row);
	} catch {
		// A row that cannot be used is reported with all others when the rows are encoded.
		return null;
	}
}

async function nearestFolder(path: string): Promise<string> {
	let folder = resolve(path);
	while (!(await stat(folder).catch(() => null))) {
		const above = dirname(folder);
		if (above === folder) break;
		folder = above;
	}
	return folder;
}

/** What in a folder shows that a run was here. */
async function tracesOfRun(folder: string): Promise<string[]> {
	const names = await readdir(folder).catch(() => []);
	return names.filter(
		(name) => name === "metrics.jsonl" || name === ".arl-model.json" || /^checkpoint-\d+$/.test(name),
	);
}

/** The output folder can be written to and holds no other run. Creates nothing. */
export async function checkOutputFolder(args: AgentTrainingConfig): Promise<string> {
	const { output_dir: outputDir } = args;
	const info = await stat(outputDir).catch(() => null);
	if (info && !info.isDirectory()) {
		throw new ArlError(
			"ARL_CONFIG",
			`output_dir: ${outputDir} is a file, where a folder is expected`,
			"Choose another output_dir.",
		);
	}
	const existing = await nearestFolder(outputDir);
	const kind = await stat(existing);
	if (!kind.isDirectory()) {
		throw new ArlError(
			"ARL_CONFIG",
			`output_dir: ${existing} is a file, so ${outputDir} cannot be made`,
			"Choose another output_dir.",
		);
	}
	await access(existing, constants.W_OK).catch((error: unknown) => {
		throw toArlError(error);
	});
	if (!info) return `${outputDir} will be made`;
	// A resumed run may be without the model that it began with.
	if ((await realpath(outputDir)) === (await realpath(args.model_name_or_path).catch(() => null))) {
		throw new ArlError(
			"ARL_CONFIG",
			`output_dir and model_name_or_path are the same folder: ${outputDir}`,
			"The trained model would take the place of the one it starts from. Choose another output_dir.",
		);
	}
	const traces = await tracesOfRun(outputDir);
	if (traces.length === 0 || args.overwrite_output_dir) return outputDir;
	if (args.resume_from_checkpoint !== null) {
		const own = args.resume_from_checkpoint === "latest" || (await isInside(args.resume_from_checkpoint, outputDir));
		if (own) return outputDir;
	}
	throw new ArlError(
		"ARL_CONFIG",
		`output_dir: ${outputDir} holds another run (${traces.slice(0, 3).join(", ")})`,
		"Choose another output_dir, go on with that run (--resume_from_checkpoint latest), or replace it (--overwrite_output_dir).",
	);
}

async function isInside(path: string, folder: string): Promise<boolean> {
	const real = await realpath(path).catch(() => null);
	return real !== null && dirname(real) === (await realpath(folder));
}

/** How many checkpoints will be on the disk at once, at most. */
export function checkpointsAtOnce(args: AgentTrainingConfig, saves: number): number {
	if (args.save_strategy === "no") return 1;
	// A new one stands before the oldest goes.
	return args.save_total_limit === null ? saves : Math.min(saves, args.save_total_limit + 1);
}

/** Bytes of one checkpoint at most: the exported weights, and exact weights with two moments in 32 bits. */
export function checkpointBytes(info: EngineInfo, model: ModelFolder): number {
	const exported = Math.max(model.weightBytes, info.parameters * 2);
	return exported + info.parameters * 12;
}

/** The disk holds the checkpoints that will stand at once. */
export async function checkDisk(outputDir: string, needed: number, count: number): Promise<string> {
	const folder = await nearestFolder(outputDir);
	const { bavail, bsize } = await statfs(folder);
	const free = bavail * bsize;
	if (needed > free) {
		throw new ArlError(
			"ARL_IO",
			`${outputDir}: ${count} checkpoints at once need ${formatBytes(needed)}, and ${formatBytes(free)} are free on this disk`,
			"Set save_total_limit, save less often, or choose an output_dir on another disk.",
		);
	}
	return `${formatBytes(needed)} for ${count} checkpoint${count === 1 ? "" : "s"} at once, ${formatBytes(free)} free`;
}

/** Names of a run's own files in an output folder; other files there are not this program's to touch. */
export async function runFolders(outputDir: string): Promise<string[]> {
	const names = await readdir(outputDir).catch(() => []);
	return names.filter((name) => /^checkpoint-\d+$/.test(name)).map((name) => join(outputDir, name));
}
