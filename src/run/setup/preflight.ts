/**
 * What is checked before anything is computed, so that what can fail fails in the first seconds and with nothing written.
 * Each check returns one line of what it found, or throws.
 */
import { constants } from "node:fs";
import { access, stat, statfs } from "node:fs/promises";
import { dirname, resolve } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { exists } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";
import type { EngineInfo, NativeTextEncoder, TextInfo } from "../../native.js";
import { bytesToTenth } from "../../report/format.js";
import type { ModelFolder } from "./model.js";

/** The tokenizer fits the model, and the token that ends a reply exists. */
export function checkTokenizer(model: Pick<ModelFolder, "path" | "vocabSize">, text: TextInfo): string {
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
	while (!(await exists(folder))) {
		const above = dirname(folder);
		if (above === folder) break;
		folder = above;
	}
	return folder;
}

/** The output folder is there or can be made, and can be written to. Creates nothing. */
export async function checkOutputPlace(outputDir: string): Promise<string> {
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
	return info ? outputDir : `${outputDir} will be made`;
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
	const checkpoints = `${count} checkpoint${count === 1 ? "" : "s"} at once`;
	if (needed > free) {
		throw new ArlError(
			"ARL_IO",
			`${outputDir}: ${checkpoints} ${count === 1 ? "needs" : "need"} ${bytesToTenth(needed)}, and ${bytesToTenth(free)} are free on this disk`,
			"Set save_total_limit, save less often, or choose an output_dir on another disk.",
		);
	}
	return `${bytesToTenth(needed)} for ${checkpoints}, ${bytesToTenth(free)} free`;
}
