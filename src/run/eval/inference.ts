/** A model that only generates: its engine, without gradients and moments, and the tokens at which its text ends. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import type { ChosenDevice } from "../../device/index.js";
import { exists } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";
import type { NativeEngine } from "../../native.js";
import { openedAdapter } from "../setup/lora.js";
import { type BatchSize, resolveBf16 } from "../setup/options.js";

/** Where and how the model computes. */
export interface InferenceOptions {
	device: ChosenDevice;
	bf16: boolean | "auto";
	/** Null: as many as the process may use. */
	threads: number | null;
	/** Folder of an adapter of the model; null or absent: none. */
	adapter?: string | null;
	/** Keep the weights of linear layers in 4 bits. */
	loadIn4bit?: boolean;
	/** Keep their scales in 8 bits. */
	nestedQuant?: boolean;
}

/**
 * Opens the engine. `size`: the prompts and replies that it holds from the start; for larger ones it reserves more. `vision`: it
 * has the model's vision tower too.
 */
export async function openForInference(
	modelDir: string,
	options: InferenceOptions,
	size: BatchSize,
	vision = false,
): Promise<NativeEngine> {
	const { device, native } = options.device;
	return await native.Engine.open({
		modelDir,
		device,
		dtype: resolveBf16(options.bf16, device) ? "bf16" : "f32",
		recompute: "block",
		...size,
		adamBeta1: 0.9,
		adamBeta2: 0.999,
		adamEpsilon: 1e-8,
		weightDecay: 0,
		inferenceOnly: true,
		...(vision && { vision }),
		...(options.threads !== null && { threads: options.threads }),
		...(options.loadIn4bit && { loadIn4bit: true, nestedQuant: options.nestedQuant ?? false }),
		...(options.adapter != null && openedAdapter(options.adapter)),
	});
}

/**
 * The tokens that end the model's text, from where transformers reads them: `eos_token_id` of `generation_config.json`, or of
 * `config.json` where that file is missing. Empty: none is named.
 */
export async function endTokens(modelDir: string): Promise<number[]> {
	const generation = join(modelDir, "generation_config.json");
	const path = (await exists(generation)) ? generation : join(modelDir, "config.json");
	const text = await readFile(path, "utf8").catch((error: unknown) => {
		throw toArlError(error);
	});
	let ids: unknown;
	try {
		ids = (JSON.parse(text) as { eos_token_id?: unknown } | null)?.eos_token_id ?? [];
	} catch {
		throw new ArlError("ARL_CONFIG", `${path}: not valid JSON`);
	}
	const list: unknown[] = Array.isArray(ids) ? ids : [ids];
	if (list.every((id): id is number => Number.isInteger(id) && Number(id) >= 0 && Number(id) < 2 ** 31)) return list;
	throw new ArlError(
		"ARL_CONFIG",
		`${path}: eos_token_id is ${JSON.stringify(ids)}; expected a token id or a list of them`,
	);
}
