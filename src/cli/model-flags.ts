/** The flags of commands that generate: how the model is opened, how tokens are chosen, and how a conversation begins. */
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import type { ChatOptions, GenerateOptions, ModelOptions } from "../api/model.js";
import {
	type AgentTrainingConfig,
	described,
	integer,
	number,
	stringOrNone,
	trainingSchema,
	type Values,
} from "../config/index.js";
import { describeBytes, imageType } from "../data/mime.js";
import type { ChatMessage } from "../data/sources/record.js";
import { ArlError, messageOf, toArlError } from "../errors.js";
import { toDataUrl } from "../images/data-url.js";

const { seed, threads, device, bf16, chat_template, thinking, load_in_4bit, use_bnb_nested_quant } =
	trainingSchema.shape;

/** How a model is opened. */
export const MODEL_FLAGS = {
	device,
	bf16: described(bf16, "Compute in bfloat16; auto: on a GPU."),
	threads,
	adapter: stringOrNone({ expects: "a folder", description: "Folder of an adapter (LoRA) of the model." }),
	load_in_4bit: described(load_in_4bit, "Keep the weights of linear layers in 4 bits (NF4)."),
	use_bnb_nested_quant: described(use_bnb_nested_quant, "With `load_in_4bit`: keep their scales in 8 bits."),
	chat_template,
	thinking,
};

/** How tokens are chosen. */
export const SAMPLING_FLAGS = {
	temperature: number({
		min: 0,
		default: 0,
		description: "0 takes the most probable token; above 0 draws with `seed`.",
	}),
	top_k: integer({ min: 0, default: 0, description: "Draw from this many of the most probable tokens; 0: from all." }),
	top_p: number({
		above: 0,
		max: 1,
		default: 1,
		description: "Draw from the fewest most probable tokens whose probabilities sum to this.",
	}),
	seed: described(seed, "Seed of the draws."),
};

/** How a conversation begins. */
export const CHAT_FLAGS = {
	system: stringOrNone({ literal: true, description: "The system message." }),
	tools: stringOrNone({
		expects: "a file",
		description: "JSON file with a list of the tools on offer, as rows have it.",
	}),
};

/** What the flags say of how a model is opened. */
export function modelOptions(flags: Values<typeof MODEL_FLAGS>): ModelOptions {
	return {
		device: flags.device,
		bf16: flags.bf16,
		...(flags.threads !== null && { threads: flags.threads }),
		...(flags.adapter !== null && { adapter: flags.adapter }),
		...(flags.load_in_4bit && { loadIn4bit: true, nestedQuant: flags.use_bnb_nested_quant }),
		...(flags.chat_template !== null && { chatTemplate: flags.chat_template }),
		...(flags.thinking !== null && { thinking: flags.thinking }),
	};
}

/** What the flags say of how images are loaded and resized. */
export function imageOptions(flags: ImageFlags): NonNullable<ModelOptions["images"]> {
	const { min_pixels, max_pixels, image_root, image_allow_private, image_max_bytes, image_timeout, image_cache_dir } =
		flags;
	return { min_pixels, max_pixels, image_root, image_allow_private, image_max_bytes, image_timeout, image_cache_dir };
}

type ImageFlags = Pick<
	AgentTrainingConfig,
	| "min_pixels"
	| "max_pixels"
	| "image_root"
	| "image_allow_private"
	| "image_max_bytes"
	| "image_timeout"
	| "image_cache_dir"
>;

/** A message of the user's with images before its text, which are files or URLs. */
export async function userMessage(text: string, images: readonly string[]): Promise<ChatMessage> {
	if (images.length === 0) return { role: "user", content: text };
	const parts = images.map(async (image) => ({
		type: "image_url" as const,
		image_url: { url: await imageUrl(image) },
	}));
	return { role: "user", content: [...(await Promise.all(parts)), { type: "text", text }] };
}

/** The URL of an image that the user names: a file's is its content, since the user may read it. */
async function imageUrl(image: string): Promise<string> {
	if (/^(https?|data):/i.test(image)) return image;
	const path = image.startsWith("file:") ? fileURLToPath(image) : image;
	const bytes = await readFile(path).catch((error: unknown) => {
		throw toArlError(error);
	});
	const type = imageType(bytes);
	if (type === null) throw new ArlError("ARL_DATA", `${image}: not a supported image: this is ${describeBytes(bytes)}`);
	return toDataUrl({ bytes, content_type: type });
}

/** What the flags say of how tokens are chosen. */
export function samplingOptions(
	flags: Values<typeof SAMPLING_FLAGS> & { max_new_tokens: number | null },
): GenerateOptions {
	const { max_new_tokens: maxNewTokens, temperature, top_k: topK, top_p: topP, seed } = flags;
	return { temperature, topK, topP, seed, ...(maxNewTokens !== null && { maxNewTokens }) };
}

/** What the flags say of a conversation: the messages that it begins with, and how its replies are generated. */
export async function chatOptions(
	flags: Values<typeof CHAT_FLAGS> & Parameters<typeof samplingOptions>[0],
): Promise<{ system: ChatMessage[]; options: ChatOptions }> {
	return {
		system: flags.system === null ? [] : [{ role: "system", content: flags.system }],
		options: { ...samplingOptions(flags), ...(flags.tools !== null && { tools: await readTools(flags.tools) }) },
	};
}

/** The tools of a JSON file. Throws `ARL_CONFIG` where it holds no list of objects. */
async function readTools(path: string): Promise<Record<string, unknown>[]> {
	const text = await readFile(path, "utf8").catch((error: unknown) => {
		throw toArlError(error);
	});
	const hint = 'For example [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]';
	let tools: unknown;
	try {
		tools = JSON.parse(text);
	} catch (error) {
		throw new ArlError("ARL_CONFIG", `${path}: not JSON: ${messageOf(error)}`, hint);
	}
	const isTool = (tool: unknown) => typeof tool === "object" && tool !== null && !Array.isArray(tool);
	if (Array.isArray(tools) && tools.every(isTool)) return tools;
	throw new ArlError("ARL_CONFIG", `${path}: expected a list of tools`, hint);
}
