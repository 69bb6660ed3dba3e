// Makes what is in `assets/` but the weights (`pretrain.mjs` makes those): rows, tokenizer and configuration.
//   node assets/make/make.mjs [FOLDER]
// writes into FOLDER (default: assets/) and overwrites what is there. Same bytes on every machine.
import { copyFileSync, mkdirSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { modelConfig } from "./model.mjs";
import { callsOf, makeRows, spacedJson } from "./rows.mjs";
import { trainTokenizer } from "./tokenizer.mjs";

const TRAIN_ROWS = 3000;
const HELD_OUT_ROWS = 150;
const TRAIN_SEED = 1;
const HELD_OUT_SEED = 2;
const MAX_VOCABULARY = 2048;

const assets = resolve(dirname(fileURLToPath(import.meta.url)), "..");

/** The texts of a row as the chat template writes them. */
function textsOf(row) {
	const texts = row.tools.map((tool) => `\n${spacedJson(tool)}\n`);
	for (const message of row.messages) {
		texts.push(`\n${message.content ?? ""}`);
		for (const { function: call } of message.tool_calls ?? [])
			texts.push(`\n{"name": "${call.name}", "arguments": ${call.arguments}}\n`);
	}
	return texts;
}

const TEMPLATE_TEXTS = [
	"system\n# Tools\n\nThese functions can be called:\n<tools>\n",
	"\n</tools>\n\nA call is a JSON object with name and arguments inside .user\nassistant\n",
];

/** Throws where a call of a held-out row is made in a row for training. */
function assertDisjoint(train, heldOut) {
	const trained = new Set(train.flatMap(callsOf));
	for (const call of heldOut.flatMap(callsOf)) {
		if (trained.has(call)) throw new Error(`held out and trained: ${call}`);
	}
}

const jsonLines = (rows) => rows.map((row) => `${JSON.stringify(row)}\n`).join("");
const json = (value) => `${JSON.stringify(value, null, 2)}\n`;

function main(folder) {
	const train = makeRows(TRAIN_ROWS, TRAIN_SEED, false);
	const heldOut = makeRows(HELD_OUT_ROWS, HELD_OUT_SEED, true);
	assertDisjoint(train, heldOut);

	const corpus = [...train.flatMap(textsOf), ...TEMPLATE_TEXTS, ...TEMPLATE_TEXTS];
	const tokenizer = trainTokenizer(corpus, MAX_VOCABULARY);
	const ids = Object.fromEntries(tokenizer.added_tokens.map(({ content, id }) => [content, id]));
	const size = Object.keys(tokenizer.model.vocab).length + tokenizer.added_tokens.length;
	const config = modelConfig({ vocabSize: size, endOfText: ids["<|endoftext|>"], endOfMessage: ids["<|im_end|>"] });

	const model = join(folder, "model");
	mkdirSync(model, { recursive: true });
	writeFileSync(join(folder, "train.jsonl"), jsonLines(train));
	writeFileSync(join(folder, "heldout.jsonl"), jsonLines(heldOut));
	writeFileSync(join(model, "tokenizer.json"), `${JSON.stringify(tokenizer)}\n`);
	writeFileSync(
		join(model, "tokenizer_config.json"),
		json({
			add_bos_token: false,
			add_prefix_space: false,
			bos_token: null,
			clean_up_tokenization_spaces: false,
			eos_token: "<|im_end|>",
			model_max_length: config.max_position_embeddings,
			pad_token: "<|endoftext|>",
			tokenizer_class: "Qwen2Tokenizer",
			unk_token: null,
		}),
	);
	writeFileSync(join(model, "config.json"), json(config));
	writeFileSync(
		join(model, "generation_config.json"),
		json({
			do_sample: false,
			eos_token_id: [ids["<|im_end|>"], ids["<|endoftext|>"]],
			pad_token_id: ids["<|endoftext|>"],
		}),
	);
	const template = join(assets, "model", "chat_template.jinja");
	if (folder !== assets) copyFileSync(template, join(model, "chat_template.jinja"));
	console.log(
		`${train.length} rows for training, ${heldOut.length} held out, ${size} tokens in the vocabulary: ${folder}`,
	);
}

main(process.argv[2] ? resolve(process.argv[2]) : assets);
