/** `arl merge`: merges an adapter into its model. */
import { readdir } from "node:fs/promises";
import { choiceOrNone, requiredString, trainingSchema } from "../config/index.js";
import { exists } from "../disk/folders.js";
import { ArlError } from "../errors.js";
import { modelFolder } from "../hub/index.js";
import { loadNative, type Native } from "../native.js";
import { liveLine } from "../report/live.js";
import { parseCommand } from "./command.js";
import { fetchingOn } from "./fetching.js";

const { model_name_or_path } = trainingSchema.shape;

export const COMMAND = {
	name: "arl merge",
	usage: "--model_name_or_path DIR --adapter DIR --output_dir DIR [--dtype TYPE]",
	about: `Merges an adapter (LoRA) into its model, in float32, and writes a model in Hugging Face's layout:
  arl merge --model_name_or_path DIR --adapter out --output_dir merged`,
	flags: {
		model_name_or_path,
		adapter: requiredString({
			expects: "a folder",
			description:
				"Folder of the adapter: adapter_config.json and adapter_model.safetensors, by this program or by PEFT.",
		}),
		output_dir: requiredString({ expects: "a folder", description: "Folder for the merged model; empty or new." }),
		dtype: choiceOrNone(["f32", "bf16", "f16"], {
			description: "Type of the weights that are written; none: that of the model's folder.",
		}),
	},
};

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const { model_name_or_path: model, adapter, output_dir: out, dtype } = given.flags;
	if ((await exists(out)) && (await readdir(out)).length > 0)
		throw new ArlError("ARL_CONFIG", `output_dir: ${out} is not empty`, "Choose a new folder for the merged model.");
	const live = liveLine(process.stderr);
	const fetch = { weights: true, progress: fetchingOn(live) };
	const found = await modelFolder(model, fetch).finally(() => live?.clear());
	if (found.notice !== null) process.stderr.write(`${found.notice}\n`);
	await core().mergeAdapter(found.path, adapter, out, dtype ?? undefined);
	process.stdout.write(`${out}\n`);
	return 0;
}
