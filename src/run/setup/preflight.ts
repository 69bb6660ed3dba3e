/**
 * Checks before anything is computed, so that a run that will fail does so in its first seconds, with nothing written.
 * Each check returns one line about what it found, or throws.
 */
import { constants } from "node:fs";
import { access, stat, statfs } from "node:fs/promises";
import { dirname, resolve } from "node:path";
import { exists } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";
import type { EngineInfo, NativeTextEncoder, TextInfo } from "../../native.js";
import { bytesToTenth } from "../../report/format.js";
import type { ModelFolder } from "./model.js";

/** Checks that the tokenizer fits the model, and that the token that ends a reply exists. */
export function checkTokenizer(model: Pick<ModelFolder, "path" | "vocabSize">, text: TextInfo): string {
	if (text.vocabSize > model.vocabSize) {
		throw new ArlError(
			"ARL_TEXT",
			`${model.path}: the tokenizer has ids up to ${text.vocabSize - 1}, and the model's vocab_size is ${model.vocabSize}`,
			"The tokenizer belongs to another model: copy the files that came with these weights.",
		);
	}
	const outside = text.stopIds.filter((id) => id < 0 || id >= model.vocabSize);
	if (text.stopIds.length === 0 || outside.length > 0) {
		throw new ArlError(
			"ARL_TEXT",
			text.stopIds.length === 0
				? `${model.path}: neither template nor tokenizer names a token that ends a reply`
				: `${model.path}: the token that ends a reply (id ${outside.join(", ")}) is outside the model's vocabulary of ${model.vocabSize}`,
			"Check eos_token in tokenizer_config.json; for Qwen it is <|im_end|>.",
		);
	}
	return `${text.vocabSize} ids of ${model.vocabSize}, template from ${text.templateSource}, a reply ends with id ${text.stopIds.join(" or ")}`;
}

/** A warning if none of the rows trains the token that ends a reply; null if one does, or none has a reply. */
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
		// Unusable rows are reported together, when all rows are encoded.
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

/** Checks that the output folder exists or can be created, and is writable. Creates nothing. */
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
			`output_dir: ${existing} is a file, so ${outputDir} cannot be created`,
			"Choose another output_dir.",
		);
	}
	await access(existing, constants.W_OK).catch((error: unknown) => {
		throw toArlError(error);
	});
	return info ? outputDir : `${outputDir} will be created`;
}

/** The most bytes of one checkpoint: the exported weights, or the adapter; exact weights, and two moments in 32 bits. */
export function checkpointBytes(info: EngineInfo, model: ModelFolder): number {
	const trained = info.trainedParameters;
	const exported = trained === info.parameters ? Math.max(model.weightBytes, trained * 2) : trained * 4;
	return exported + trained * 12;
}

/** Checks that the disk has room for so many checkpoints. */
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
