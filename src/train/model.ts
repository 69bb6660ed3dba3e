/**
 * What the trainer itself needs to know of a model's folder: a few numbers of its config, and an identity for resuming.
 * What a model is, and whether its files are sound, is the core's business.
 */
import { createHash } from "node:crypto";
import { open, readdir, readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { ArlError, toArlError } from "../errors.js";

export interface ModelFolder {
	path: string;
	modelType: string;
	vocabSize: number;
	maxPositionEmbeddings: number | null;
	/** Of `config.json` and of samples of the weights' bytes. */
	identity: { config: string; weights: string };
	/** Bytes of all weights files; 0: there are none. */
	weightBytes: number;
}

async function readConfig(path: string): Promise<{ bytes: Buffer; config: Record<string, unknown> }> {
	const file = join(path, "config.json");
	const bytes = await readFile(file).catch((error: NodeJS.ErrnoException) => {
		if (error.code !== "ENOENT") throw toArlError(error);
		throw new ArlError(
			"ARL_CONFIG",
			`${file}: no such file: the folder is no model in Hugging Face's layout`,
			"It should hold config.json, *.safetensors, tokenizer.json and a chat template.",
		);
	});
	try {
		const config: unknown = JSON.parse(bytes.toString("utf8"));
		if (typeof config === "object" && config !== null && !Array.isArray(config)) {
			return { bytes, config: config as Record<string, unknown> };
		}
	} catch (error) {
		throw new ArlError("ARL_CONFIG", `${file}: not JSON: ${error instanceof Error ? error.message : String(error)}`);
	}
	throw new ArlError("ARL_CONFIG", `${file}: expected a JSON object`);
}

function positive(config: Record<string, unknown>, key: string): number | null {
	const value = config[key];
	return typeof value === "number" && Number.isSafeInteger(value) && value > 0 ? value : null;
}

/** What a model's `config.json` says. */
export type ModelFacts = Pick<ModelFolder, "path" | "modelType" | "vocabSize" | "maxPositionEmbeddings"> & {
	/** Of the file's bytes. */
	config: string;
};

/** Reads `config.json` alone; there may be no weights. Throws `ARL_CONFIG` where the folder is none of a model. */
export async function readModelFacts(path: string): Promise<ModelFacts> {
	const info = await stat(path).catch(() => null);
	if (info === null || !info.isDirectory()) {
		throw new ArlError(
			"ARL_CONFIG",
			`model_name_or_path: ${path} ${info === null ? "does not exist" : "is no folder"}`,
			"Give a model's folder; nothing is downloaded.",
		);
	}
	const { bytes, config } = await readConfig(path);
	const vocabSize = positive(config, "vocab_size");
	if (vocabSize === null)
		throw new ArlError("ARL_CONFIG", `${join(path, "config.json")}: vocab_size is missing or no count`);
	return {
		path,
		modelType: String(config.model_type ?? "unknown"),
		vocabSize,
		maxPositionEmbeddings: positive(config, "max_position_embeddings"),
		config: createHash("sha256").update(bytes).digest("hex"),
	};
}

/** Reads what a run needs to know first. Throws `ARL_CONFIG` where the folder is none of a model. */
export async function readModelFolder(path: string): Promise<ModelFolder> {
	const { config, ...facts } = await readModelFacts(path);
	const weights = await weightsIdentity(path);
	return { ...facts, identity: { config, weights: weights.identity }, weightBytes: weights.bytes };
}

const SAMPLES = 64;
const SAMPLE_BYTES = 64 * 1024;

/**
 * Sizes, headers and 64 evenly spaced blocks of each weights file. A whole hash of a large model would take longer than
 * loading it; the exact weights that a resumed run goes on with are in its checkpoint, hashed in full.
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
