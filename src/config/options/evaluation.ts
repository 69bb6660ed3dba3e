/** Options of the evaluation of held-out rows: which rows, when, and what follows from the result. */
import { z } from "zod";
import { boolean, choice, custom, integer, integerOrNone, number, stringOrNone, strings } from "../fields.js";

export const evaluation = {
	eval_strategy: choice(["no", "steps", "epoch"], {
		default: "no",
		description: "When to evaluate the held-out rows: never, every `eval_steps`, or after each epoch.",
	}),
	eval_file: strings({
		expects: "files, folders or globs, each as PATH or NAME=PATH",
		description:
			"Held-out rows, in every form that `train_file` takes. With several entries each also gets its own figures, `eval_NAME_loss` and so on; the name of an entry without one is that of its file. A path with `=` in it is written as ./PATH.",
	}),
	eval_split: custom(
		z
			.union([z.number().gt(0).lt(1), z.string().min(1)])
			.nullable()
			.default(null),
		{
			kind: "number",
			expects: "a part of all rows (above 0 and below 1), or the name of a split such as validation; or none",
			description:
				"Rows to hold out of those that are given. A part: such a share of the rows of `train_file`, chosen by a hash of `data_seed` and each row's content, and not trained. A name: from each folder of `train_file` and from the database the rows of this split.",
		},
	),
	eval_steps: custom(
		z
			.number()
			.gt(0)
			.refine((value) => value < 1 || Number.isSafeInteger(value))
			.nullable()
			.default(null),
		{
			kind: "number",
			expects: "a whole number of steps, or a part of all steps (above 0 and below 1); or none",
			description: "Steps between evaluations with `eval_strategy steps`; none: `logging_steps`.",
		},
	),
	eval_delay: number({
		default: 0,
		min: 0,
		description:
			"No evaluation before so many steps (with `eval_strategy steps`) or epochs (with `eval_strategy epoch`) are done.",
	}),
	eval_on_start: boolean({
		default: false,
		description: "Evaluate once before the first step too.",
	}),
	per_device_eval_batch_size: integer({
		default: 8,
		min: 1,
		max: 65536,
		description:
			"Held-out rows evaluated at a time, unless `max_tokens_per_micro_batch` counts tokens. It changes memory and speed, never the result.",
	}),
	eval_generate: integer({
		default: 0,
		min: 0,
		max: 1_000_000,
		description:
			"Held-out rows whose replies are generated at each evaluation, spread evenly over all: `eval_exact_match` is the share that equals the expected ones (tool calls as JSON, text exactly), and metrics.jsonl has their texts.",
	}),
	eval_metric: stringOrNone({
		expects: "a file",
		description:
			"With `eval_generate`: module (.ts or .js) whose default export is a function of `(row, reply)` that returns a number, reported as `eval_metric`, or numbers by name, reported as `eval_NAME`; means over all replies.",
	}),
	load_best_model_at_end: boolean({
		default: false,
		description:
			"Leave the best checkpoint's model in `output_dir` at the end, not the last one's. Each checkpoint must then have an evaluation: the same `save_strategy` as `eval_strategy`, with `save_steps` a multiple of `eval_steps`, or `save_strategy best`.",
	}),
	metric_for_best_model: stringOrNone({
		expects: "a figure of the evaluation, such as loss, mean_token_accuracy, perplexity or NAME_loss",
		description: "What decides which evaluation is the best, with or without `eval_` in front; none: loss.",
	}),
	greater_is_better: custom(z.boolean().nullable().default(null), {
		kind: "boolean",
		expects: "true, false or none",
		switch: true,
		description:
			"Whether a greater `metric_for_best_model` is better; none: unless its name ends in loss, perplexity or entropy.",
	}),
	early_stopping_patience: integerOrNone({
		min: 1,
		description:
			"End the run after so many evaluations in a row without a better `metric_for_best_model`; none: never. The model is saved as after all steps.",
	}),
	early_stopping_threshold: number({
		default: 0,
		min: 0,
		description:
			"With `early_stopping_patience`: how much the metric must change for the better for an evaluation to count as better.",
	}),
};
