/** The trained model in `output_dir` itself, where scripts for Hugging Face's Trainer save it and load it from. */
import { copyFile, cp, link, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { exists, makeFolder } from "../../disk/folders.js";
import { syncPath } from "../../disk/write-whole.js";
import { ArlError, toArlError } from "../../errors.js";
import type { NativeEngine } from "../../native.js";

/** The list of the model's files in `output_dir` that this program wrote, and so may remove. */
export const MODEL_LIST = ".arl-model.json";
const PARTIAL = ".model.partial";
const MERGED_PARTIAL = `.${MERGED_FOLDER}.partial`;
/** Whichever of these a folder has makes it a model, or an adapter. */
const CONFIGS = ["config.json", "adapter_config.json"];

/** Names of files that loaders of a model's folder read: transformers, PEFT, vLLM. */
const MODEL_FILES: ReadonlySet<string> = new Set([
	"config.json",
	"generation_config.json",
	"quantize_config.json",
	"hf_quant_config.json",
	"adapter_config.json",
	"adapter_model.bin",
	"tf_model.h5",
	"flax_model.msgpack",
	"tokenizer.json",
	"tokenizer.model",
	"tokenizer_config.json",
	"special_tokens_map.json",
	"added_tokens.json",
	"vocab.json",
	"merges.txt",
	"vocab.txt",
	"chat_template.jinja",
	"chat_template.json",
	"additional_chat_templates",
	"preprocessor_config.json",
	"processor_config.json",
	"video_preprocessor_config.json",
]);

/** Weights in one file or in shards, and the index that names the shards: a loader follows it wherever it finds one. */
const WEIGHTS = /\.safetensors(\.index\.json)?$|^pytorch_model.*\.bin(\.index\.json)?$|^consolidated.*\.pth$/;

/** Whether a loader of the folder would read the file, or the folder, of this name. */
export function isModelFile(name: string): boolean {
	return !name.startsWith(".") && (MODEL_FILES.has(name) || WEIGHTS.test(name));
}

/** The model's files in `output_dir` that this program wrote. */
export async function publishedFiles(outputDir: string): Promise<string[]> {
	const text = await readFile(join(outputDir, MODEL_LIST), "utf8").catch(() => "[]");
	try {
		const names: unknown = JSON.parse(text);
		return Array.isArray(names) ? names.filter((name) => typeof name === "string" && !name.includes("/")) : [];
	} catch {
		return [];
	}
}

/** Whether `output_dir` holds a model with all of its files. */
export async function isPublished(outputDir: string): Promise<boolean> {
	const names = await publishedFiles(outputDir);
	const there = await Promise.all(names.map((name) => exists(join(outputDir, name))));
	return CONFIGS.some((name) => names.includes(name)) && there.every((is) => is);
}

/** Removes the model of an earlier run from `output_dir`. */
export async function removePublished(outputDir: string): Promise<void> {
	for (const name of await publishedFiles(outputDir)) await rm(join(outputDir, name), { recursive: true, force: true });
	await rm(join(outputDir, MODEL_LIST), { force: true });
}

/** Removes the partial files of a process that was killed while it published a model. Returns the paths. */
export async function removeUnplaced(outputDir: string): Promise<string[]> {
	const published = await publishedFiles(outputDir);
	const removed: string[] = [];
	for (const name of await readdir(outputDir).catch(() => [])) {
		const file = /^\.(.+)\.partial$/.exec(name)?.[1];
		const own = name === PARTIAL || name === MERGED_PARTIAL;
		if (file === undefined || !(own || published.includes(file) || isModelFile(file))) continue;
		removed.push(join(outputDir, name));
	}
	for (const path of removed) await rm(path, { recursive: true, force: true });
	return removed;
}

/** The one folder within a model. */
const TEMPLATES = "additional_chat_templates";

/** Moves or copies a model's files into `output_dir`, one by one; the config last, because it makes the folder a model. */
async function place(folder: string, outputDir: string, move: boolean): Promise<void> {
	await removePublished(outputDir);
	const entries = await readdir(folder, { withFileTypes: true });
	const names = entries.filter((entry) => entry.isFile() || entry.name === TEMPLATES).map(({ name }) => name);
	names.sort((a, b) => Number(CONFIGS.includes(a)) - Number(CONFIGS.includes(b)));
	await writeFile(join(outputDir, MODEL_LIST), `${JSON.stringify(names)}\n`);
	for (const name of names) {
		const from = join(folder, name);
		const to = join(outputDir, name);
		if (move) await rename(from, to);
		else {
			const partial = join(outputDir, `.${name}.partial`);
			await rm(partial, { recursive: true, force: true });
			await copyOrLink(from, partial);
			await rename(partial, to);
		}
	}
	await syncPath(outputDir);
}

/** Links weights, which takes no space, and copies small files: people edit them, and the checkpoint must not change. */
async function copyOrLink(from: string, to: string): Promise<void> {
	if (!from.endsWith(".safetensors")) return cp(from, to, { recursive: true, errorOnExist: true });
	// Where the file system has no hard links.
	await link(from, to).catch(() => copyFile(from, to));
}

/** Publishes the model of a checkpoint in `output_dir`. */
export async function publishCheckpoint(checkpoint: string, outputDir: string): Promise<void> {
	await place(checkpoint, outputDir, false).catch((error: unknown) => {
		throw publishError(error, outputDir, `The model is in ${checkpoint}.`);
	});
}

/** Publishes the engine's model in `output_dir`. */
export async function publishEngine(engine: Pick<NativeEngine, "exportModel">, outputDir: string): Promise<void> {
	const partial = join(outputDir, PARTIAL);
	try {
		await rm(partial, { recursive: true, force: true });
		await makeFolder(partial);
		await engine.exportModel(partial);
		await place(partial, outputDir, true);
	} catch (error) {
		throw publishError(error, outputDir);
	} finally {
		await rm(partial, { recursive: true, force: true }).catch(() => {});
	}
}

/** Writes the model with the published adapter merged into it, and notes its folder among the files of this program. */
export async function publishMerged(
	merge: (adapterDir: string, outDir: string) => Promise<void>,
	outputDir: string,
): Promise<void> {
	const [partial, place] = [join(outputDir, MERGED_PARTIAL), join(outputDir, MERGED_FOLDER)];
	try {
		await rm(partial, { recursive: true, force: true });
		await merge(outputDir, partial);
		const names = await publishedFiles(outputDir);
		await writeFile(join(outputDir, MODEL_LIST), `${JSON.stringify([...names, MERGED_FOLDER])}\n`);
		await rename(partial, place);
		await syncPath(outputDir);
	} catch (error) {
		throw publishError(error, outputDir, `The adapter is in ${outputDir}.`);
	} finally {
		await rm(partial, { recursive: true, force: true }).catch(() => {});
	}
}

function publishError(error: unknown, outputDir: string, where = ""): ArlError {
	const cause = toArlError(error);
	const message = `${outputDir}: the trained model could not be written there: ${cause.message}`;
	return new ArlError(cause.code, message, `${cause.hint} ${where}`.trim(), { cause });
}
