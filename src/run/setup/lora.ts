/** Adapters of low rank: their configuration as PEFT spells it, and what a user reads of them. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { toArlError } from "../../errors.js";
import type { EngineOptions, MemoryPlan } from "../../native.js";

type LoraOptions = Pick<EngineOptions, "lora" | "adapterDir">;

/** Whether the run trains adapters. */
export function hasAdapters(args: AgentTrainingConfig): boolean {
	return args.use_peft || args.adapter_name_or_path !== null;
}

/** The engine's options of adapters. Throws `ARL_IO` where an adapter to continue has no configuration. */
export function loraOptions(args: AgentTrainingConfig): LoraOptions {
	if (args.adapter_name_or_path !== null) return openedAdapter(args.adapter_name_or_path);
	if (!args.use_peft) return {};
	const config = {
		peft_type: "LORA",
		task_type: "CAUSAL_LM",
		r: args.lora_r,
		lora_alpha: args.lora_alpha,
		lora_dropout: args.lora_dropout,
		use_rslora: args.use_rslora,
		// Only where it is asked for: checkpoints of earlier versions do not have it.
		...(args.use_dora && { use_dora: true }),
		target_modules: targets(args.lora_target_modules),
		target_parameters: args.lora_target_parameters,
		modules_to_save: args.lora_modules_to_save,
	};
	return { lora: JSON.stringify(config) };
}

/** An adapter that exists. Throws `ARL_IO` where the folder has none. */
export function openedAdapter(adapterDir: string): LoraOptions {
	try {
		return { lora: readFileSync(join(adapterDir, "adapter_config.json"), "utf8"), adapterDir };
	} catch (error) {
		throw toArlError(error);
	}
}

/** A list, or one text, which PEFT takes for a regular expression: one plain name is a list here. */
function targets(given: readonly string[]): string | readonly string[] | null {
	const [first] = given;
	if (first === undefined) return null;
	return given.length === 1 && (first === "all-linear" || !/^[\w.]+$/.test(first)) ? first : given;
}

/** What is adapted, in a line; null: nothing is. */
export function adaptedText({ adapted, parameters, trainedParameters }: MemoryPlan): string | null {
	if (adapted === undefined) return null;
	const layers = adapted.map(({ name, count }) => `${name} ${count}`).join(", ");
	const share = ((100 * trainedParameters) / parameters).toPrecision(2);
	const numbers = `${trainedParameters.toLocaleString("en-US")} parameters are trained`;
	return `layers with adapters: ${layers}; ${numbers}, ${share} % of the model's ${parameters.toLocaleString("en-US")}`;
}
