/** What the page knows of a run, as JSON: curves of bounded size, figures and sentences, configuration, rows, checkpoints. */
import { resolve } from "node:path";
import { type Figures, lowerIsBetter } from "../runs/figures.js";
import type { HighestLosses } from "../runs/highest-losses.js";
import type { RunReader, RunState } from "../runs/read-run.js";
import type { Part, RunRecord, ShownOption } from "../runs/record.js";
import type { SampledRow } from "../runs/samples.js";
import { baseOf, chatCommand, mergedFolder, resultFolder, type Sentence, shellWord } from "../runs/sentences.js";
import type { Curves } from "../runs/table.js";

/** Points of a curve, at most. */
const POINTS = 400;
/** Points of all curves of evaluation together. */
const EVALUATION_POINTS = 6000;
/** Bytes of all samples together. */
const SAMPLE_BYTES = 40_000;
/** Characters of a value, a warning or an error; the page has room for lists of a thousand files nowhere. */
const MOST_CHARACTERS = 600;

/** Metrics of training that are drawn, and those whose extremes are. */
const DRAWN = [
	"loss",
	"mean_token_accuracy",
	"entropy",
	"learning_rate",
	"grad_norm",
	"tokens_per_second",
	"waiting_share",
	"rss_bytes",
	"loss_scale",
];
const SPREAD = ["loss", "grad_norm", "tokens_per_second"];

/** A curve of evaluation, and which way is better. */
export interface Evaluated {
	name: string;
	lowerIsBetter: boolean;
}

export interface RunData {
	/** The folder, absolute. */
	folder: string;
	name: string;
	state: RunState;
	/** ISO 8601: when the record was written. */
	updated: string | null;
	training: Curves;
	evaluation: Curves;
	evaluated: Evaluated[];
	figures: Figures | null;
	sentences: Sentence[];
	samples: { rows: SampledRow[]; others: number };
	/** Null: no evaluation names such rows. */
	highestLosses: HighestLosses | null;
	/** Null: no such line was written yet. */
	trainedRows: HighestLosses | null;
	options: ShownOption[];
	start: RunRecord["start"] | null;
	rows: RunRecord["rows"];
	skipped: Record<string, number>;
	parts: Part[];
	saves: RunRecord["saves"];
	warnings: string[];
	error: RunRecord["error"];
	/** Commands that use the result; empty where there is none. */
	commands: { label: string; command: string }[];
}

/** The data of a run. `points`: of a curve, at most. */
export function runData(reader: RunReader, points = POINTS): RunData {
	const { record, training, evaluation } = reader;
	const names = evaluation.names.filter((name) => name.startsWith("eval_"));
	const each = Math.min(points, Math.max(20, Math.floor(EVALUATION_POINTS / Math.max(1, names.length))));
	const model = record === null ? null : resultFolder(record, reader.folder);
	const base = record === null ? null : baseOf(record);
	const merged = record === null || model === null ? null : mergedFolder(record, model);
	return {
		folder: resolve(reader.folder),
		name: reader.name,
		state: reader.state,
		updated: record?.updated ?? null,
		training: training.curves(DRAWN, points, SPREAD),
		evaluation: evaluation.curves(names, each),
		evaluated: names.map((name) => ({ name, lowerIsBetter: lowerIsBetter(name) })),
		figures: reader.figures,
		sentences: reader.sentences,
		samples: reader.samples.within(SAMPLE_BYTES),
		highestLosses: reader.highestLosses,
		trainedRows: reader.trainedRows,
		options: (record?.options ?? []).map((option) => ({ ...option, value: cutValue(option.value) })),
		start: record?.start ?? null,
		rows: record?.rows ?? null,
		skipped: record?.skipped ?? {},
		parts: record?.parts.slice(-20) ?? [],
		saves: record?.saves.slice(-20) ?? [],
		warnings: (record?.warnings ?? []).slice(-20).map(cut),
		error: record?.error ? { ...record.error, message: cut(record.error.message) } : null,
		commands: [
			...(merged === null ? [] : commands(resolve(merged), null)),
			...(model === null || merged !== null ? [] : commands(resolve(model), base === null ? null : resolve(base))),
		],
	};
}

/** `base`: the model whose adapter `model` is. */
function commands(model: string, base: string | null): RunData["commands"] {
	const word = shellWord(model);
	const chat = { label: "Chat with it", command: chatCommand(model, base) };
	if (base !== null) {
		const given = `--model_name_or_path ${shellWord(base)} --adapter ${word}`;
		return [
			chat,
			{ label: "One reply", command: `npx arl generate ${given} --prompt "Hello"` },
			{ label: "Merge it into its model", command: `npx arl merge ${given} --output_dir merged` },
			{
				label: "Serve it with vLLM",
				command: `vllm serve ${shellWord(base)} --enable-lora --lora-modules ${shellWord(`adapter=${model}`)}`,
			},
			{ label: "Load it with PEFT", command: `AutoPeftModelForCausalLM.from_pretrained(${JSON.stringify(model)})` },
		];
	}
	return [
		chat,
		{ label: "One reply", command: `npx arl generate --model_name_or_path ${word} --prompt "Hello"` },
		{ label: "Serve it with vLLM", command: `vllm serve ${word}` },
		{ label: "Load it with transformers", command: `AutoModelForCausalLM.from_pretrained(${JSON.stringify(model)})` },
	];
}

function cut(text: string): string {
	return text.length > MOST_CHARACTERS ? `${text.slice(0, MOST_CHARACTERS)} ...` : text;
}

function cutValue(value: unknown): unknown {
	const text = JSON.stringify(value) ?? "";
	return text.length > MOST_CHARACTERS ? cut(text) : value;
}
