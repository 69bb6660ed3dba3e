/**
 * What each error code means: the table behind `arl explain` and docs/errors.md. A code without an entry does not compile.
 * Imports the list of codes alone.
 */
import { type ErrorCode, EXIT_CODES, EXIT_MEANINGS } from "../errors.js";

/** What a user should know of a code. */
export interface Explanation {
	/** What has happened, in one sentence. */
	meaning: string;
	/** What leads to it, the most frequent cause first. */
	causes: readonly string[];
	/** What to do, in the order in which to try it. */
	fixes: readonly string[];
	/** Commands of which the last one fails so, and how what it prints begins. Null: none does so reliably. */
	example: { command: string; prints: string } | null;
}

const MODEL = "--model_name_or_path assets/model";
const TRAIN = `npx arl train ${MODEL} --train_file assets/train.jsonl`;

/** Every code with its explanation. The examples run in a clone; a test runs them. */
export const EXPLANATIONS: Readonly<Record<ErrorCode, Explanation>> = {
	ARL_USAGE: {
		meaning: "The command line, or a call in code, is not one that arl understands.",
		causes: [
			"An option is misspelled, or belongs to another command.",
			"A flag lacks its value, or has one that it does not take.",
			"Two flags were given of which only one can have an effect.",
		],
		fixes: [
			"Follow the hint below the message: it names the nearest option.",
			"`npx arl COMMAND --help` lists what the command takes; docs/options.md lists every option of a run.",
			"Shell completion offers the options by their names: `npx arl completion bash --help`.",
		],
		example: {
			command: "npx arl train --lerning_rate 1e-4",
			prints: "ARL_USAGE unknown option --lerning_rate\n  what to do: Did you mean --learning_rate?",
		},
	},
	ARL_CONFIG: {
		meaning: "An option of the run, or the model's config.json, is wrong or asks for something that is not built.",
		causes: [
			"A value is out of range, or two options contradict each other.",
			"An option of another trainer has no counterpart here.",
			"The path of the model is wrong, or its architecture is not supported.",
			"output_dir holds something that the run would replace.",
		],
		fixes: [
			"The message has a line for each wrong option, with the value, where it came from, and what is expected.",
			"`npx arl train ... --print_config` shows every value and its origin: a flag, a file, or the default.",
			"docs/options.md says which options of Hugging Face's and TRL's trainers are known, and why some are refused.",
		],
		example: {
			command: `${TRAIN} --output_dir out/explained --learning_rate -1`,
			prints: "ARL_CONFIG learning_rate: -1 (a flag); expected a number, 0 or more",
		},
	},
	ARL_DATA: {
		meaning: "Rows, or a file of rows, cannot be used.",
		causes: [
			"The file does not exist, or the pattern matches nothing.",
			"A row is not JSON, lacks `messages`, or has no reply to train.",
			"A row is longer than `max_length`.",
			"An image of a row is broken, cannot be fetched, or is given to a model that reads text only.",
			"An image has changed, or is gone, since its row's tokens were made.",
		],
		fixes: [
			"The message names file, line and reason of each bad row: mend those.",
			"`npx arl data check` with the same options reports all bad rows at once, and trains nothing.",
			"`--on_bad_row skip` leaves bad rows out and reports each; `--truncation` says what happens to long ones.",
			"`--columns prompt=question` names columns that have other names than the known ones.",
			"`--image_root DIR` allows images in files below DIR; `--images drop` trains on the text alone.",
		],
		example: {
			command: `npx arl inspect ${MODEL} --train_file assets/trian.jsonl`,
			prints: "ARL_DATA assets/trian.jsonl: no such file\n  what to do: Did you mean assets/train.jsonl?",
		},
	},
	ARL_TEXT: {
		meaning: "The chat template or the tokenizer cannot be used, or does not fit the model.",
		causes: [
			"The model's folder lacks tokenizer.json or a chat template.",
			"The chat template is not valid Jinja, or raises an error for a row.",
			"The tokenizer belongs to another model: its ids exceed `vocab_size`.",
		],
		fixes: [
			"Copy tokenizer.json, tokenizer_config.json and chat_template.jinja from the model that the weights belong to.",
			"`--chat_template FILE` replaces the model's template.",
			"`npx arl inspect` shows a row as the template renders it.",
		],
		example: {
			command: `echo '{% if %}' > broken.jinja\nnpx arl inspect ${MODEL} --train_file assets/train.jsonl --chat_template broken.jinja`,
			prints:
				"ARL_TEXT broken.jinja: the chat template cannot be read: unexpected end of block (line 1 of the template)",
		},
	},
	ARL_WEIGHTS: {
		meaning: "A file of weights is missing or damaged, or its tensors are not those of the model.",
		causes: [
			"The folder has config.json and no safetensors: the download was incomplete, or the weights are .bin files.",
			"A file is cut off, or a shard of model.safetensors.index.json is missing.",
			"The weights belong to a model of another size.",
		],
		fixes: [
			"Fetch the model again, or name it: `--model_name_or_path OWNER/NAME` fetches from the Hub what is missing, and checks it.",
			"Weights in .bin files: load them with transformers, and save them with `save_pretrained`.",
			"`--init_from_config` starts from random weights on purpose.",
		],
		example: {
			command:
				"cp -r assets/model half\nhead -c 100000 assets/model/model.safetensors > half/model.safetensors\nnpx arl generate --model_name_or_path half --prompt Hello",
			prints:
				"ARL_WEIGHTS half/model.safetensors: is truncated or has bytes too many: its 100000 bytes are not what the header says",
		},
	},
	ARL_STATE: {
		meaning: "The saved state of a run is damaged, or belongs to another run.",
		causes: [
			"The rows, the model or an option that decides the numbers has changed since the checkpoint.",
			"A file of the checkpoint was changed or cut off.",
			"The folder holds a model, not a checkpoint.",
		],
		fixes: [
			"The message names what differs: undo that, and resume.",
			"Start from the trained weights with a new run: `--model_name_or_path CHECKPOINT --output_dir NEW`.",
			"`--resume_from_checkpoint latest` takes the newest checkpoint that is whole.",
		],
		example: {
			command: `${TRAIN} --output_dir out/first --max_steps 2 --save_steps 1\n${TRAIN} --output_dir out/first --max_steps 2 --seed 7 --resume_from_checkpoint latest`,
			prints: "ARL_STATE out/first/checkpoint-2: the checkpoint is of another run:\n  seed: 42 -> 7",
		},
	},
	ARL_IO: {
		meaning: "The operating system refused to read or write a file.",
		causes: [
			"The disk is full, or a quota is reached.",
			"The file belongs to another user, or the file system is read-only.",
			"A disk or a network share has failed.",
		],
		fixes: [
			"The message names the file and the system's reason.",
			"Free some space, or choose another `--output_dir`; fewer checkpoints: `--save_total_limit 2`.",
			"The last complete checkpoint is whole: `--resume_from_checkpoint latest` continues from it.",
		],
		example: null,
	},
	ARL_NETWORK: {
		meaning: "Something that had to be fetched from a server could not be fetched, or was not what it had to be.",
		causes: [
			"The name of the model, data set or revision is wrong, or access needs a token.",
			"The server cannot be reached: no network, a proxy, a wrong HF_ENDPOINT or index.",
			"The connection broke several times, or the content does not have its published hash.",
			"HF_HUB_OFFLINE is set, and the cache does not have the files.",
		],
		fixes: [
			"Run the same command again: what was fetched is kept, and the rest follows.",
			"Private or restricted: accept the terms on the model's page, then set HF_TOKEN.",
			"Behind a proxy set HTTPS_PROXY; for another Hub HF_ENDPOINT; for another Python index PIP_INDEX_URL.",
			"Without a network: fetch on another machine, and give the folder.",
		],
		example: {
			command: `HF_HUB_OFFLINE=1 HF_HOME=out/empty npx arl train --model_name_or_path Qwen/Qwen3-0.6B --train_file assets/train.jsonl --output_dir out/explained`,
			prints: "ARL_NETWORK Qwen/Qwen3-0.6B is not in the cache (out/empty/hub), and HF_HUB_OFFLINE forbids to fetch it",
		},
	},
	ARL_OOM: {
		meaning: "There is not enough memory, on the GPU or in the machine.",
		causes: [
			"Micro-batches have too many tokens: a large batch, or long rows.",
			"The model, its gradients and moments alone do not fit.",
			"Other programs hold the memory.",
		],
		fixes: [
			"The message lists the plan of memory, and what each change would save.",
			"`npx arl plan` with the same options shows the same without rows, weights or a GPU.",
			"First: a smaller `--per_device_train_batch_size` with more `--gradient_accumulation_steps`; then `--gradient_checkpointing block`; then `--use_peft`.",
		],
		example: null,
	},
	ARL_NONFINITE: {
		meaning: "A loss or a gradient is not a finite number, so a step would have ruined the weights.",
		causes: [
			"The learning rate is too high.",
			"A row has a weight or advantage that is far out of range.",
			"The weights that the run started from contain such numbers already.",
		],
		fixes: [
			"Lower `--learning_rate`, or give it `--warmup_steps`.",
			"Resume from the last checkpoint, which is from before: `--resume_from_checkpoint latest`.",
			"`--fp16` skips such steps and lowers its loss scale; bf16 has the range of float32.",
		],
		example: {
			command: `${TRAIN} --output_dir out/steep --learning_rate 1e30 --max_steps 3 --save_strategy no`,
			prints: "ARL_NONFINITE step 2: the gradient norm is NaN",
		},
	},
	ARL_DEVICE: {
		meaning: "The device, or a rank of the run, cannot be used.",
		causes: [
			"`--device cuda` on a machine without a usable NVIDIA GPU, driver, libraries or addon.",
			"A rank was killed, or cannot reach rank 0.",
		],
		fixes: [
			"`npx arl doctor` shows what is missing, and what to do about it.",
			"`npx arl cuda install` fetches NVIDIA's libraries.",
			"`--device auto` takes a GPU where one can be used, else the CPU.",
		],
		example: {
			command: `${TRAIN} --output_dir out/gpu --device cuda`,
			prints: "ARL_DEVICE device cuda",
		},
	},
	ARL_INTERRUPTED: {
		meaning: "The run ended because it was asked to: by Ctrl-C, a signal, or an AbortSignal.",
		causes: ["Ctrl-C, SIGTERM or a closed terminal.", "Code aborted the signal that it gave to `run` or `train`."],
		fixes: [
			"The run saved a checkpoint before it ended: `--resume_from_checkpoint latest` continues from it, equal in every bit.",
		],
		example: null,
	},
	ARL_USER: {
		meaning: "A function that was given to arl threw: a metric, a callback, or the length of a data set.",
		causes: [
			"The error is in the code of the module named in the message.",
			"What a converter or a data set throws for a row is a bad row instead: ARL_DATA.",
		],
		fixes: [
			"The message has what was thrown. ARL_DEBUG=1 prints the trace; in code, `cause` has the error itself.",
			"Call the function by itself, with the row or event that the message names.",
		],
		example: {
			command: `echo 'export default () => { throw new Error("no metric today"); }' > metric.mjs\nnpx arl eval ${MODEL} --eval_file assets/heldout.jsonl --eval_generate 1 --eval_metric ./metric.mjs`,
			prints: "ARL_USER eval_metric threw: no metric today",
		},
	},
	ARL_INTERNAL: {
		meaning: "arl itself is wrong: something happened that its code takes to be impossible.",
		causes: ["A defect of arl."],
		fixes: [
			"ARL_DEBUG=1 prints where it happened. Please report that, with the command and the output of `npx arl doctor`.",
			"The last complete checkpoint is whole: `--resume_from_checkpoint latest` continues from it.",
		],
		example: null,
	},
};

/** The codes in the order of their exit codes' table. */
export const CODES = Object.keys(EXIT_CODES) as ErrorCode[];

/** The page of errors in docs/, in Markdown. */
export function errorsMarkdown(): string {
	const lines = [
		"# Errors",
		"",
		"This page is generated from the table behind `npx arl explain CODE` (`npm run docs:errors`). Every error has a code, a message",
		"(what is wrong, and where) and mostly a hint (what to do). `--json` prints them as JSON; in code they are an `ArlError` with",
		"`code`, `message` and `hint`. Programs may depend on the code and on the exit code. Examples run in a clone.",
		"",
		"| exit code | meaning | codes |",
		"|---|---|---|",
		...Object.entries(EXIT_MEANINGS).map(([exit, meaning]) => {
			const codes = CODES.filter((code) => String(EXIT_CODES[code]) === exit);
			return `| ${exit} | ${meaning} | ${codes.map((code) => `[\`${code}\`](#${code.toLowerCase()})`).join(", ")} |`;
		}),
	];
	for (const code of CODES) {
		const { meaning, causes, fixes, example } = EXPLANATIONS[code];
		lines.push("", `## ${code}`, "", meaning, "", "Causes:", "", ...causes.map((cause) => `- ${cause}`));
		lines.push("", "What to do:", "", ...fixes.map((fix) => `- ${fix}`));
		if (example !== null) {
			const commands = example.command.split("\n").map((line) => `$ ${line}`);
			lines.push("", "```", ...commands, ...example.prints.split("\n"), "```");
		}
	}
	return `${lines.join("\n")}\n`;
}
