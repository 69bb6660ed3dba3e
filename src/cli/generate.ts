/** `arl generate`: one reply to a prompt, or the trained replies of rows compared with the expected ones. */
import {
	described,
	flag,
	integer,
	integerOrNone,
	stringOrNone,
	strings,
	trainingSchema,
	type Values,
} from "../config/index.js";
import { ArlError } from "../errors.js";
import { loadNative, type Native } from "../native.js";
import { jsonLine } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { modelText } from "../report/terminal.js";
import { parseCommand } from "./command.js";
import { fetchingOn } from "./fetching.js";
import { generateRows } from "./generate-rows.js";
import {
	CHAT_FLAGS,
	chatOptions,
	imageOptions,
	MODEL_FLAGS,
	modelOptions,
	SAMPLING_FLAGS,
	samplingOptions,
	userMessage,
} from "./model-flags.js";
import { stoppable } from "./signals.js";

const { model_name_or_path, columns, images, min_pixels, max_pixels } = trainingSchema.shape;
const { image_root, image_allow_private, image_max_bytes, image_timeout, image_cache_dir } = trainingSchema.shape;

export const COMMAND = {
	name: "arl generate",
	usage: "--model_name_or_path DIR (--prompt TEXT | --prompt_file FILE...) [--OPTION VALUE ...]",
	about: `Writes a model's reply to a prompt, as it is generated:
  arl generate --model_name_or_path DIR --prompt "What is the capital of France?"
  arl generate --model_name_or_path DIR --prompt "What is this?" --image cat.jpg

With --prompt_file it generates the trained replies of rows, and counts those that equal the expected ones:
  arl generate --model_name_or_path DIR --prompt_file heldout.jsonl --compare BASE`,
	flags: {
		model_name_or_path,
		prompt: stringOrNone({ literal: true, description: "A user's message, rendered by the model's chat template." }),
		image: strings({
			expects: "files or http, https or data URLs",
			description: "With --prompt: images before the text of the message, for a model with a vision tower.",
		}),
		...CHAT_FLAGS,
		raw: flag("Take --prompt as it is, without the chat template, and continue it."),
		prompt_file: strings({
			expects: "files, folders or globs",
			description: "Rows whose trained replies are generated, in any shape that `arl train` takes.",
		}),
		compare: stringOrNone({
			expects: "a folder",
			description: "With --prompt_file: a second model, shown next to the first.",
		}),
		limit: integerOrNone({ min: 1, description: "With --prompt_file: take the first rows only; none: all." }),
		examples: integer({
			min: 0,
			default: 3,
			description: "With --prompt_file: replies that are shown in full.",
		}),
		per_device_eval_batch_size: integer({
			min: 1,
			max: 4096,
			default: 32,
			description: "With --prompt_file: replies that are generated at a time.",
		}),
		max_new_tokens: integerOrNone({
			min: 1,
			description: "Most tokens of a reply; none: 1024, and with --prompt_file 8 more than the longest expected reply.",
		}),
		...SAMPLING_FLAGS,
		...MODEL_FLAGS,
		columns,
		images,
		min_pixels,
		max_pixels,
		image_root,
		image_allow_private,
		image_max_bytes,
		image_timeout,
		image_cache_dir: described(image_cache_dir, "Folder that keeps fetched images; none: they are not kept."),
		json: flag("Print JSON: the whole reply; with --prompt_file a line for each reply, then one for each model."),
	},
};

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const { flags } = given;
	const { prompt, raw } = flags;
	checkTogether(flags);
	return stoppable(async (signal) => {
		if (prompt === null) return generateRows(core(), flags, signal);
		const { system, options } = await chatOptions(flags);
		const { Model } = await import("../api/model.js");
		const live = liveLine(process.stderr);
		const opening = { ...modelOptions(flags), images: imageOptions(flags), signal, onFetch: fetchingOn(live) };
		await using model = await Model.open(flags.model_name_or_path, opening).finally(() => live?.clear());
		for (const notice of model.notices) process.stderr.write(`${notice}\n`);
		const reply = raw
			? model.generate(prompt, { ...samplingOptions(flags), signal })
			: model.chat([...system, await userMessage(prompt, flags.image)], { ...options, signal });
		if (!flags.json) for await (const text of reply) process.stdout.write(modelText(text, process.stdout));
		const completion = await reply.completion();
		process.stdout.write(flags.json ? `${jsonLine(completion)}\n` : "\n");
		if (completion.finishReason === "length") {
			const { completionTokens: tokens } = completion;
			process.stderr.write(`cut off after ${tokens} tokens; --max_new_tokens sets the bound\n`);
		}
		return 0;
	});
}

/** Throws `ARL_USAGE` for flags of which one has no effect with the other. */
function checkTogether({
	prompt,
	raw,
	system,
	tools,
	image,
	prompt_file,
	compare,
	limit,
}: Values<typeof COMMAND.flags>): void {
	const refuse = (message: string) => {
		throw new ArlError("ARL_USAGE", message, "`arl generate --help` shows both uses.");
	};
	if ((prompt === null) === (prompt_file.length === 0)) refuse("give either --prompt TEXT or --prompt_file FILE...");
	const ofPrompts = { raw, system: system !== null, tools: tools !== null, image: image.length > 0 };
	const ofRows = { compare: compare !== null, limit: limit !== null };
	const [wrong] = Object.entries(prompt === null ? ofPrompts : ofRows).filter(([, given]) => given);
	if (wrong) refuse(`--${wrong[0]} has no effect with --prompt${prompt === null ? "_file" : ""}`);
	if (raw && (ofPrompts.system || ofPrompts.tools || ofPrompts.image))
		refuse("--raw takes neither --system nor --tools nor --image");
}
