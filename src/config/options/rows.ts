/** Options of what is trained on: the model, and where rows, images and their texts come from. */
import { z } from "zod";
import {
	boolean,
	caps,
	choice,
	choiceOrNone,
	integer,
	integerOrNone,
	map,
	numberOrNone,
	requiredString,
	string,
	stringOrNone,
	strings,
	weights,
} from "../fields.js";

export const model = {
	model_name_or_path: requiredString({
		expects: "a folder",
		description:
			"Folder of the model in Hugging Face's layout: config.json, safetensors weights, tokenizer.json and a chat template. Nothing is downloaded.",
	}),
	init_from_config: boolean({
		default: false,
		description:
			"Start from random weights drawn with `seed` instead of the folder's. Without it a folder that has no weights is an error.",
	}),
	device: string({
		default: "auto",
		pattern: /^(auto|cpu|cuda(:\d+)?)$/,
		expects: "auto, cpu, cuda or cuda:N",
		description:
			"Where the engine runs: on the CPU, on the first GPU that can be used, or on the GPU with that number. Auto: on a GPU where one can be used, else on the CPU. `arl doctor` shows what there is.",
	}),
	threads: integerOrNone({
		min: 1,
		max: 1024,
		description: "Threads that compute; none: as many as the process may use.",
	}),
};

export const rows = {
	train_file: strings({
		expects: "files, folders or globs",
		description:
			"Files of rows: JSONL, JSON, Parquet or CSV, plain or compressed with gzip or zstd; what a file is, its content says. Of a folder the files of `split` are read. Several entries are read one after the other, or mixed as `train_weights` says.",
	}),
	split: stringOrNone({
		default: "train",
		expects: "a name such as train, validation or test",
		description:
			"Which split of the rows is trained: of a folder, the files that have it in their names; of a database, the documents that bear it, with train also those that bear none. None: all of them.",
	}),
	train_weights: weights({
		description:
			"How large a part of each epoch comes from each entry of `train_file`, as relative weights in the same order; none: every row of every file once.",
	}),
	train_caps: caps({
		description:
			"The most rows of each entry of `train_file` that are used at all, in the same order: which ones is drawn once with `data_seed`. None for an entry is no bound.",
	}),
	dataset: stringOrNone({
		expects: "a file",
		description:
			"Module (.ts or .js) whose default export is a data set of rows, or a function that gives one for `{ args, split }`. Beside `train_file` it is one entry more, the last.",
	}),
	convert: stringOrNone({
		expects: "a file",
		description:
			"Module (.ts or .js) whose default export makes rows of each raw row: one, several in a list, or null to leave it out.",
	}),
	columns: map(
		{
			literal: true,
			expects: "names and columns, as JSON or as NAME=COLUMN ...",
			description:
				"Names of columns that differ from the known ones, for example `prompt=question completion=answer`. The shape of the rows is otherwise found from the first ones.",
		},
		z.string().min(1),
	),
	on_bad_row: choice(["error", "skip"], {
		default: "error",
		description:
			"What a row that cannot be used does: stop the run before training, or be left out. It is reported with file, line and reason either way.",
	}),
	train_sampling_strategy: choice(["random", "sequential"], {
		default: "random",
		description: "Order of the rows: shuffled again each epoch with `data_seed`, or in the order of the files.",
	}),
	minimal_advantage: numberOrNone({
		description: "Replies whose advantage is lower are not trained; none: no bound.",
	}),
	drop_zero_advantage: boolean({
		default: false,
		description: "Do not train replies whose advantage is 0.",
	}),
	skip_non_positive_advantage: boolean({
		default: false,
		description: "Do not train replies whose advantage is 0 or lower.",
	}),
	cache_dir: stringOrNone({
		expects: "a folder",
		description:
			"Folder for tokens of rows that were encoded before, and for rows while they are unpacked; none: `.cache` in `output_dir`.",
	}),
	preprocess_seconds: numberOrNone({
		min: 0,
		description:
			"How long rows are encoded and checked before the first step; what is left is encoded while the first steps compute. None: 20, and 0.2 where all rows come from a database.",
	}),
};

export const images = {
	images: choice(["error", "drop"], {
		default: "error",
		description:
			"What image parts do in rows for a model that reads text only: the row cannot be used, or they are left out, counted and reported.",
	}),
};

export const database = {
	db_connection_string: stringOrNone({
		secret: true,
		expects: "mongodb://USER:PASSWORD@HOST:PORT/DATABASE",
		description:
			"MongoDB database that rows are read from, in addition to or in place of `train_file`. The environment variable `ARL_DB_CONNECTION_STRING` is used where no rows are given; it is never shown.",
	}),
	db_source: choice(["auto", "Record", "DBRecordData"], {
		default: "auto",
		description: "Collection of the rows; auto: the one of the two that has rows.",
	}),
	db_match: map(
		{
			expects: "a MongoDB query as JSON, or FIELD=VALUE ...",
			description:
				'A condition that documents must fulfil besides all others, as Extended JSON: `\'{"meta_infos.source": "web"}\'`.',
		},
		z.json(),
	),
	max_trained_count: integer({
		default: 1,
		min: 1,
		description:
			"Documents that were trained this often before the run are left out. Rows of files carry no such count; `num_train_epochs` says how often a run trains each row.",
	}),
	retrained_interval: integer({
		default: 1,
		min: 1,
		description:
			"At least so many steps between two trainings of a row: documents of which `last_trained_step` is nearer to the last step that the collection knows are left out, and epochs that would bring a row again sooner are refused.",
	}),
	mongo_write_back: choice(["ack", "agentrl", "none"], {
		default: "ack",
		description:
			"What is written back once a checkpoint is complete. ack: `trained_count` and `last_trained_step` of its rows, exactly once for each row and epoch, with a ledger in `arl_acks`. agentrl: only fields that AgentRL knows, and no collection; exact as long as one run at a time trains a row. None: nothing. Nothing is ever deleted.",
	}),
	follow: boolean({
		default: false,
		description:
			"Train rows as they arrive: those that are there and those that arrive during the run, each claimed for this run alone and trained once, in the order of the claims. Needs `max_steps` and `train_sampling_strategy sequential`.",
	}),
	follow_idle: numberOrNone({
		above: 0,
		description:
			"Seconds without a new row after which a run that follows a database trains what is left and ends; none: it waits until `max_steps` are done.",
	}),
};

export const text = {
	chat_template: stringOrNone({
		expects: "a file",
		description: "File of a Jinja chat template that replaces the checkpoint's own.",
	}),
	chat_template_date: stringOrNone({
		expects: "a date such as 2024-02-29",
		description:
			"The day that a chat template prints which calls `strftime_now`; none: today, in UTC. A run that is resumed on another day needs that of its beginning.",
	}),
	thinking: choiceOrNone(["keep", "strip", "last"], {
		description:
			"What happens to reasoning in assistant messages: kept in all, stripped from all, or kept in the last; none: as the template does.",
	}),
	max_length: integerOrNone({
		min: 2,
		description: "Longest sample in tokens; none: the model's `max_position_embeddings`.",
	}),
	truncation: choice(["error", "drop", "left", "right"], {
		default: "error",
		description:
			"What happens to a longer sample: stop before training, leave the row out, or cut it at its left or its right end. It is reported either way.",
	}),
};
