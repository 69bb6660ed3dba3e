/**
 * The trained model in `output_dir` itself, where scripts for Hugging Face's Trainer leave it and look for it.
 */
import { copyFile, cp, link, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { toArlError } from "../errors.js";
import { makeFolder } from "../folders.js";
import type { NativeEngine } from "../native.js";
import { listCheckpoints, removeCheckpoint, syncPath } from "./checkpoint.js";

/** Names of the model's files in `output_dir`: what this program put there and may remove. */
const LIST = ".arl-model.json";
const PARTIAL = ".model.partial";

async function readList(outputDir: string): Promise<string[]> {
	const text = await readFile(join(outputDir, LIST), "utf8").catch(() => "[]");
	try {
		const names: unknown = JSON.parse(text);
		return Array.isArray(names) ? names.filter((name) => typeof name === "string" && !name.includes("/")) : [];
	} catch {
		return [];
	}
}

/** Removes the model of an earlier run from `output_dir`. */
async function removePublished(outputDir: string): Promise<void> {
	for (const name of await readList(outputDir)) await rm(join(outputDir, name), { recursive: true, force: true });
	await rm(join(outputDir, LIST), { force: true });
}

/** Removes what another run left: checkpoints and its model. Other files stay. */
export async function removeRun(outputDir: string): Promise<void> {
	for (const checkpoint of await listCheckpoints(outputDir)) await removeCheckpoint(checkpoint);
	await rm(join(outputDir, PARTIAL), { recursive: true, force: true });
	await removePublished(outputDir);
}

/** The one folder that a model has in it. */
const TEMPLATES = "additional_chat_templates";

/**
 * Puts a folder's model into `output_dir`, one by one under their final names; the config last, since it makes it a model.
 */
async function place(folder: string, outputDir: string, move: boolean): Promise<void> {
	await removePublished(outputDir);
	const entries = await readdir(folder, { withFileTypes: true });
	const names = entries.filter((entry) => entry.isFile() || entry.name === TEMPLATES).map(({ name }) => name);
	names.sort((a, b) => Number(a === "config.json") - Number(b === "config.json"));
	await writeFile(join(outputDir, LIST), `${JSON.stringify(names)}\n`);
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

/** Weights get a second name, which takes no room; what is small is copied: people edit it, and the checkpoint must stay. */
async function copyOrLink(from: string, to: string): Promise<void> {
	if (!from.endsWith(".safetensors")) return cp(from, to, { recursive: true, errorOnExist: true });
	// A file system without second names gets a copy.
	await link(from, to).catch(() => copyFile(from, to));
}

/** The model of a checkpoint, as files of `output_dir`. */
export async function publishCheckpoint(checkpoint: string, outputDir: string): Promise<void> {
	await place(checkpoint, outputDir, false).catch((error: unknown) => {
		throw toArlError(error);
	});
}

/** The engine's model, as files of `output_dir`. */
export async function publishEngine(engine: Pick<NativeEngine, "exportModel">, outputDir: string): Promise<void> {
	const partial = join(outputDir, PARTIAL);
	try {
		await rm(partial, { recursive: true, force: true });
		await makeFolder(partial);
		await engine.exportModel(partial);
		await place(partial, outputDir, true);
	} catch (error) {
		throw toArlError(error);
	} finally {
		await rm(partial, { recursive: true, force: true }).catch(() => {});
	}
}
