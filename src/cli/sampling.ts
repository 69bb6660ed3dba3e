/** The flags of commands that generate: which model, and how its tokens are chosen. */
import type { GenerateOptions, ModelOptions } from "../api/model.js";
import { described, integer, number, trainingSchema, type Values } from "../config/index.js";

const { seed, threads, device, bf16, chat_template, thinking } = trainingSchema.shape;

/** How a model is opened. */
export const MODEL_FLAGS = {
	device,
	bf16: described(bf16, "Compute in bfloat16; auto: on a GPU."),
	threads,
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

/** What the flags say of how a model is opened. */
export function modelOptions(flags: Values<typeof MODEL_FLAGS>): ModelOptions {
	return {
		device: flags.device,
		bf16: flags.bf16,
		...(flags.threads !== null && { threads: flags.threads }),
		...(flags.chat_template !== null && { chatTemplate: flags.chat_template }),
		...(flags.thinking !== null && { thinking: flags.thinking }),
	};
}

/** What the flags say of how tokens are chosen. */
export function samplingOptions(flags: Values<typeof SAMPLING_FLAGS>): GenerateOptions {
	return { temperature: flags.temperature, topK: flags.top_k, topP: flags.top_p, seed: flags.seed };
}
