/**
 * What the trainer itself reads from a model's folder: a few numbers of its config, and an identity for resuming.
 * The core reads the rest, and checks the files.
 */
import { createHash } from "node:crypto";
import { open, readdir, readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { exists } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";
import type { Native } from "../../native.js";

export interface ModelFolder {
	path: string;
	modelType: string;
	vocabSize: number;
	maxPositionEmbeddings: number;
	/** Whether the model has a vision tower. */
	vision: boolean;
	/** Of `config.json` and of samples of the weights' bytes. */
	identity: ModelIdentity;
	/** Bytes of all weights files; 0 without any. */
	weightBytes: number;
}

/** Hashes that distinguish models. */
export interface ModelIdentity {
	config: string;
	weights: string;
}

/** What `config.json` contains. */
export type ModelFacts = Pick<ModelFolder, "path" | "modelType" | "vocabSize" | "maxPositionEmbeddings" | "vision">;

/** Reads `config.json` alone; weights may be missing. Throws `ARL_CONFIG` if the model cannot be trained. */
export async function readModelFacts(path: string, native: Pick<Native, "modelConfig">): Promise<ModelFacts> {
	const info = await stat(path).catch(() => null);
	if (info === null || !info.isDirectory()) {
		throw new ArlError(
			"ARL_CONFIG",
			`model_name_or_path: ${path} ${info === null ? "does not exist" : "is not a folder"}`,
			"Give a model's folder, or OWNER/NAME of a model on the Hugging Face Hub, such as Qwen/Qwen3-0.6B.",
		);
	}
	return { path, ...native.modelConfig(path), vision: await hasTower(path) };
}

/** Whether the `config.json` of a folder describes a vision tower. What is wrong with that file is reported by the core. */
export async function hasTower(path: string): Promise<boolean> {
	const text = await readFile(join(path, "config.json"), "utf8").catch(() => "{}");
	try {
		const { vision_config: tower } = JSON.parse(text) as { vision_config?: unknown };
		return typeof tower === "object" && tower !== null;
	} catch {
		return false;
	}
}

/** Reads `config.json`, and samples of the weights. Throws `ARL_CONFIG` if the model cannot be trained. */
export async function readModelFolder(path: string, native: Pick<Native, "modelConfig">): Promise<ModelFolder> {
	const facts = await readModelFacts(path, native);
	const config = await configIdentity(path);
	const weights = await weightsIdentity(path);
	return { ...facts, identity: { config, weights: weights.identity }, weightBytes: weights.bytes };
}

async function configIdentity(path: string): Promise<string> {
	const bytes = await readFile(join(path, "config.json")).catch((error: unknown) => {
		throw toArlError(error);
	});
	return createHash("sha256").update(bytes).digest("hex");
}

/**
 * The identity of the model that a resumed run began with, as far as its folder still exists; else `known`, from the checkpoint.
 * A folder that was moved away, emptied or unmounted is no change.
 */
export async function baseIdentity(path: string, known: ModelIdentity): Promise<ModelIdentity> {
	if (!(await exists(join(path, "config.json")))) return known;
	const { identity, bytes } = await weightsIdentity(path);
	return { config: await configIdentity(path), weights: bytes === 0 ? known.weights : identity };
}

const SAMPLES = 64;
const SAMPLE_BYTES = 64 * 1024;

/**
 * Hashes the size and 64 evenly spaced blocks of each weights file. A hash of all bytes of a large model would take longer than
 * loading it; the exact weights from which a run resumes are in its checkpoint, hashed in full.
 */
async function weightsIdentity(path: string): Promise<{ identity: string; bytes: number }> {
	const names = (await readdir(path)).filter((name) => name.endsWith(".safetensors")).sort();
	const hash = createHash("sha256");
	let bytes = 0;
	for (const name of names) {
		const file = await open(join(path, name), "r").catch((error: unknown) => {
			throw toArlError(error);
		});
		try {
			const { size } = await file.stat();
			bytes += size;
			hash.update(`${name}:${size}\n`);
			const buffer = Buffer.alloc(SAMPLE_BYTES);
			const last = Math.max(0, size - SAMPLE_BYTES);
			for (let i = 0; i < SAMPLES; i++) {
				const at = Math.floor((last * i) / (SAMPLES - 1));
				const { bytesRead } = await file.read(buffer, 0, SAMPLE_BYTES, at);
				hash.update(buffer.subarray(0, bytesRead));
				if (last === 0) break;
			}
		} finally {
			await file.close();
		}
	}
	return { identity: hash.digest("hex"), bytes };
}
