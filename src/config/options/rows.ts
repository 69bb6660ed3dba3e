/** Options of the input: the model, its rows, and how they become text. */
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
		expects: "a folder, or OWNER/NAME of the Hugging Face Hub",
		description:
			"Folder of the model in Hugging Face's layout: config.json, safetensors weights, tokenizer.json and a chat template. Or its name on the Hub, such as `Qwen/Qwen3-0.6B` or `OWNER/NAME@REVISION`: what the Hub's cache lacks is fetched into it. A local folder of that name comes first; `hf://OWNER/NAME` always means the Hub.",
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
			"Where the engine runs: on the CPU, on the first usable GPU, or on the GPU with that number. Auto: on a GPU if one is usable, else on the CPU. `arl doctor` lists the devices.",
	}),
	threads: integerOrNone({
		min: 1,
		max: 1024,
		description: "Compute threads; none: as many as the process may use.",
	}),
};

export const rows = {
	train_file: strings({
		expects: "files, folders or globs",
		description:
			"Files of rows: JSONL, JSON, Parquet or CSV, plain or compressed with gzip or zstd; the content of a file decides, not its name. From a folder the files of `split` are read. `hf://datasets/OWNER/NAME/PATH` (or `NAME@REVISION`) is a file, folder or glob of a data set on the Hugging Face Hub. Several entries are read in turn, or mixed by `train_weights`.",
	}),
	split: stringOrNone({
		default: "train",
		expects: "a name such as train, validation or test",
		description:
			"Split to train on: from a folder, the files with this name in theirs; from a database, the documents of this split, and for train also those without one. None: all rows.",
	}),
	train_weights: weights({
		description:
			"Relative share of each entry of `train_file` in an epoch, in the same order; none: every row of every file once.",
	}),
	train_caps: caps({
		description:
			"The most rows to use from each entry of `train_file`, in the same order, drawn once with `data_seed`. None for an entry: no bound.",
	}),
	dataset: stringOrNone({
		expects: "a file",
		description:
			"Module (.ts or .js) whose default export is a data set of rows, or a function of `{ args, split }` that returns one. Next to `train_file` it counts as one more entry, the last.",
	}),
	convert: stringOrNone({
		expects: "a file",
		description:
			"Module (.ts or .js) whose default export converts a raw row: to one row, to several in a list, or to null to leave it out.",
	}),
	columns: map(
		{
			literal: true,
			expects: "names and columns, as JSON or as NAME=COLUMN ...",
			description:
				"Names of columns that differ from the known ones, for example `prompt=question completion=answer`. Otherwise the first rows show the shape of all.",
		},
		z.string().min(1),
	),
	on_bad_row: choice(["error", "skip"], {
		default: "error",
		description:
			"What happens if a row cannot be used. error: the run stops before training. skip: the row is left out. Either way it is reported with file, line and reason.",
	}),
	train_sampling_strategy: choice(["random", "sequential"], {
		default: "random",
		description: "Order of the rows: shuffled for each epoch with `data_seed`, or as in the files.",
	}),
	minimal_advantage: numberOrNone({
		description: "Replies with a lower advantage are not trained; none: no bound.",
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
			"Folder for the tokens of encoded rows, and for rows while they are unpacked; none: `.cache` in `output_dir`.",
	}),
	preprocess_seconds: numberOrNone({
		min: 0,
		description:
			"How long rows are encoded and checked before the first step; the others are encoded while the first steps compute. None: 20, or 0.2 if all rows come from a database.",
	}),
};

export const database = {
	db_connection_string: stringOrNone({
		secret: true,
		expects: "mongodb://USER:PASSWORD@HOST:PORT/DATABASE",
		description:
			"MongoDB database to read rows from, in addition to or instead of `train_file`. If no rows are given, the environment variable `ARL_DB_CONNECTION_STRING` is used. It is never shown.",
	}),
	db_source: choice(["auto", "Record", "DBRecordData"], {
		default: "auto",
		description: "Collection of the rows; auto: whichever of the two has rows.",
	}),
	db_match: map(
		{
			expects: "a MongoDB query as JSON, or FIELD=VALUE ...",
			description: 'A further condition on the documents, as Extended JSON: `\'{"meta_infos.source": "web"}\'`.',
		},
		z.json(),
	),
	max_trained_count: integer({
		default: 1,
		min: 1,
		description:
			"Documents that were trained this often before the run are left out. Rows of files have no such count; `num_train_epochs` sets how often a run trains each row.",
	}),
	retrained_interval: integer({
		default: 1,
		min: 1,
		description:
			"The fewest steps between two trainings of a row: documents whose `last_trained_step` is closer to the last step in the collection are left out, and epochs that would repeat a row sooner are refused.",
	}),
	mongo_write_back: choice(["ack", "agentrl", "none"], {
		default: "ack",
		description:
			"What is written back once a checkpoint is complete. ack: `trained_count` and `last_trained_step` of its rows, exactly once per row and epoch, with a ledger in `arl_acks`. agentrl: only fields that AgentRL knows, and no collection of its own; exact as long as one run at a time trains a row. None: nothing. Nothing is ever deleted.",
	}),
	follow: boolean({
		default: false,
		description:
			"Train rows as they arrive: the rows of the database and those that arrive during the run, each leased for this run alone and trained once, in the order of the leases. Needs `max_steps` and `train_sampling_strategy sequential`.",
	}),
	follow_idle: numberOrNone({
		above: 0,
		description:
			"Seconds without a new row after which a run that follows a database trains the remaining rows and ends; none: it waits until `max_steps` are done.",
	}),
};

export const text = {
	chat_template: stringOrNone({
		expects: "a file",
		description: "Jinja chat template that replaces the checkpoint's own.",
	}),
	chat_template_date: stringOrNone({
		expects: "a date such as 2024-02-29",
		description:
			"The date for chat templates that call `strftime_now`; none: today, in UTC. A run that is resumed on another day needs the date of its start.",
	}),
	thinking: choiceOrNone(["keep", "strip", "last"], {
		description:
			"What happens to reasoning in assistant messages: kept in all, stripped from all, or kept in the last one; none: as the template does.",
	}),
	max_length: integerOrNone({
		min: 2,
		description: "Longest sample in tokens; none: the model's `max_position_embeddings`.",
	}),
	truncation: choice(["error", "drop", "left", "right"], {
		default: "error",
		description:
			"What happens to a longer sample. error: the run stops before training. drop: the row is left out. left and right: the sample is cut at that end. Each is reported.",
	}),
};
