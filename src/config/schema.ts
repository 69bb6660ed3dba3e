/**
 * THE schema: every option by its name, type, range, default and description. Types, flags, help, JSON Schema and the
 * table of options in docs/ all derive from it. Names are those of Hugging Face's TrainingArguments and TRL's SFTConfig,
 * and of AgentRL where those have none.
 */
import { z } from "zod";
import {
	boolean,
	caps,
	choice,
	choiceOrNone,
	custom,
	integer,
	integerOrNone,
	map,
	number,
	numberOrNone,
	only,
	requiredString,
	secretOrNone,
	stepsOrRatio,
	string,
	stringOrNone,
	strings,
	weights,
} from "./fields.js";

/** The groups of options, in the order in which help shows them. */
export const GROUPS = [
	"Model",
	"Rows",
	"Images",
	"Database",
	"Text",
	"Batch and length of the run",
	"Optimizer",
	"Precision and memory",
	"Checkpoints",
	"Output",
	"Several devices",
	"AgentRL",
] as const;

/** Those schedules of Hugging Face that depend on the step alone. */
export const SCHEDULE_NAMES = [
	"linear",
	"cosine",
	"cosine_with_restarts",
	"polynomial",
	"constant",
	"constant_with_warmup",
	"inverse_sqrt",
	"cosine_with_min_lr",
	"cosine_warmup_with_min_lr",
	"warmup_stable_decay",
] as const;

const model = {
	model_name_or_path: requiredString({
		group: "Model",
		expects: "a folder",
		description:
			"Folder of the model in Hugging Face's layout: config.json, safetensors weights, tokenizer.json and a chat template. Nothing is downloaded.",
	}),
	init_from_config: boolean({
		group: "Model",
		default: false,
		description:
			"Start from random weights drawn with `seed` instead of the folder's. Without it a folder that has no weights is an error.",
	}),
	device: string({
		group: "Model",
		default: "auto",
		pattern: /^(auto|cpu|cuda(:\d+)?)$/,
		expects: "auto, cpu, cuda or cuda:N",
		description:
			"Where the engine runs: on the CPU, on the first GPU that can be used, or on the GPU with that number. Auto: on a GPU where one can be used, else on the CPU. `arl doctor` shows what there is.",
	}),
	threads: integerOrNone({
		group: "Model",
		min: 1,
		max: 1024,
		description: "Threads that compute; none: as many as the process may use.",
	}),
};

const rows = {
	train_file: strings({
		group: "Rows",
		expects: "files, folders or globs",
		description:
			"Files of rows: JSONL, JSON, Parquet or CSV, plain or compressed with gzip or zstd; what a file is, its content says. Of a folder the files of `split` are read. Several entries are read one after the other, or mixed as `train_weights` says.",
	}),
	split: stringOrNone({
		group: "Rows",
		default: "train",
		expects: "a name such as train, validation or test",
		description:
			"Which split of the rows is trained: of a folder, the files that have it in their names; of a database, the documents that bear it, with train also those that bear none. None: all of them.",
	}),
	train_weights: weights({
		group: "Rows",
		description:
			"How large a part of each epoch comes from each entry of `train_file`, as relative weights in the same order; none: every row of every file once.",
	}),
	train_caps: caps({
		group: "Rows",
		description:
			"The most rows of each entry of `train_file` that are used at all, in the same order: which ones is drawn once with `data_seed`. None for an entry is no bound.",
	}),
	dataset: stringOrNone({
		group: "Rows",
		expects: "a file",
		description:
			"Module (.ts or .js) whose default export is a data set of rows, or a function that gives one for `{ args, split }`. Beside `train_file` it is one entry more, the last.",
	}),
	convert: stringOrNone({
		group: "Rows",
		expects: "a file",
		description:
			"Module (.ts or .js) whose default export makes rows of each raw row: one, several in a list, or null to leave it out.",
	}),
	columns: map(
		{
			group: "Rows",
			expects: "names and columns, as JSON or as NAME=COLUMN ...",
			description:
				"Names of columns that differ from the known ones, for example `prompt=question completion=answer`. The shape of the rows is otherwise found from the first ones.",
		},
		z.string().min(1),
	),
	on_bad_row: choice(["error", "skip"], {
		group: "Rows",
		default: "error",
		description:
			"What a row that cannot be used does: stop the run before training, or be left out. It is reported with file, line and reason either way.",
	}),
	train_sampling_strategy: choice(["random", "sequential"], {
		group: "Rows",
		default: "random",
		description: "Order of the rows: shuffled anew each epoch with `data_seed`, or as they stand in the files.",
	}),
	minimal_advantage: numberOrNone({
		group: "Rows",
		description: "Replies whose advantage is lower are not trained; none: no bound.",
	}),
	drop_zero_advantage: boolean({
		group: "Rows",
		default: false,
		description: "Do not train replies whose advantage is 0.",
	}),
	skip_non_positive_advantage: boolean({
		group: "Rows",
		default: false,
		description: "Do not train replies whose advantage is 0 or lower.",
	}),
	cache_dir: stringOrNone({
		group: "Rows",
		expects: "a folder",
		description: "Folder for tokens of rows that were encoded before; none: `.cache` in `output_dir`.",
	}),
	preprocess_seconds: numberOrNone({
		group: "Rows",
		min: 0,
		description:
			"How long rows are encoded and checked before the first step; what is left is encoded while the first steps compute. None: 20, and 0.2 where all rows come from a database.",
	}),
};

const images = {
	images: choice(["error", "drop"], {
		group: "Images",
		default: "error",
		description:
			"What image parts do in rows for a model that reads text only: the row cannot be used, or they are left out, counted and reported.",
	}),
};

const database = {
	db_connection_string: secretOrNone({
		group: "Database",
		expects: "mongodb://USER:PASSWORD@HOST:PORT/DATABASE",
		description:
			"MongoDB database that rows are read from, beside or in place of `train_file`. The environment variable `ARL_DB_CONNECTION_STRING` stands in for it where no rows are given; it is never shown.",
	}),
	db_source: choice(["auto", "Record", "DBRecordData"], {
		group: "Database",
		default: "auto",
		description: "Collection of the rows; auto: the one of the two that has rows.",
	}),
	db_match: map(
		{
			group: "Database",
			expects: "a MongoDB query as JSON, or FIELD=VALUE ...",
			description:
				'A condition that documents must fulfil besides all others, as Extended JSON: `\'{"meta_infos.source": "web"}\'`.',
		},
		z.json(),
	),
	max_trained_count: integer({
		group: "Database",
		default: 1,
		min: 1,
		description:
			"Documents that were trained this often before the run are left out. Rows of files carry no such count; `num_train_epochs` says how often a run trains each row.",
	}),
	retrained_interval: integer({
		group: "Database",
		default: 1,
		min: 1,
		description:
			"At least so many steps lie between two trainings of a row: documents of which `last_trained_step` is nearer to the last step that the collection knows are left out, and epochs that would bring a row again sooner are refused.",
	}),
	mongo_write_back: choice(["ack", "agentrl", "none"], {
		group: "Database",
		default: "ack",
		description:
			"What is written once a checkpoint stands. ack: `trained_count` and `last_trained_step` of its rows, exactly once for each row and epoch, with a ledger in `arl_acks`. agentrl: only fields that AgentRL knows, and no collection; exact as long as one run at a time trains a row. None: nothing. Nothing is ever deleted.",
	}),
	follow: boolean({
		group: "Database",
		default: false,
		description:
			"Train rows as they arrive: those that are there and those that come while the run goes on, each claimed for this run alone and trained once, in the order of the claims. Needs `max_steps` and `train_sampling_strategy sequential`.",
	}),
	follow_idle: numberOrNone({
		group: "Database",
		above: 0,
		description:
			"Seconds without a new row after which a run that follows a database trains what is left and ends; none: it waits until `max_steps` are done.",
	}),
};

const text = {
	chat_template: stringOrNone({
		group: "Text",
		expects: "a file",
		description: "File of a Jinja chat template that replaces the checkpoint's own.",
	}),
	thinking: choiceOrNone(["keep", "strip", "last"], {
		group: "Text",
		description:
			"What happens to reasoning in assistant messages: kept in all, stripped from all, or kept in the last; none: as the template does.",
	}),
	max_length: integerOrNone({
		group: "Text",
		min: 2,
		description: "Longest sample in tokens; none: the model's `max_position_embeddings`.",
	}),
	truncation: choice(["error", "drop", "left", "right"], {
		group: "Text",
		default: "error",
		description:
			"What happens to a longer sample: stop before training, leave the row out, or cut it at its left or its right end. It is reported either way.",
	}),
};

const batch = {
	per_device_train_batch_size: integer({
		group: "Batch and length of the run",
		default: 8,
		min: 1,
		max: 65536,
		description: "Samples in a micro-batch. They lie side by side without padding.",
	}),
	max_tokens_per_micro_batch: integerOrNone({
		group: "Batch and length of the run",
		min: 2,
		max: 16_777_216,
		description:
			"Packing: fill each micro-batch with samples up to this many tokens instead of counting samples. Samples never see each other, so the same samples give the same loss either way.",
	}),
	gradient_accumulation_steps: integer({
		group: "Batch and length of the run",
		default: 1,
		min: 1,
		max: 65536,
		description:
			"Micro-batches in an optimizer step. The loss is the mean over all target tokens of the step, however it is split.",
	}),
	num_train_epochs: number({
		group: "Batch and length of the run",
		default: 3,
		above: 0,
		max: 1_000_000,
		description: "Times that all rows are trained; a fraction ends within an epoch.",
	}),
	max_steps: custom(
		z
			.int()
			.refine((value) => value === -1 || value >= 1)
			.default(-1),
		{
			group: "Batch and length of the run",
			kind: "integer",
			expects: "a whole number of 1 or more, or -1",
			default: "-1",
			description: "Optimizer steps in all, in place of `num_train_epochs`; -1: as many as the epochs give.",
		},
	),
	seed: integer({
		group: "Batch and length of the run",
		default: 42,
		min: 0,
		max: 4_294_967_295,
		description: "Seed of everything that is random.",
	}),
	data_seed: integerOrNone({
		group: "Batch and length of the run",
		min: 0,
		max: 4_294_967_295,
		description: "Seed of the order of the rows; none: `seed`.",
	}),
};

const optimizer = {
	learning_rate: number({
		group: "Optimizer",
		default: 2e-5,
		min: 0,
		description: "The highest learning rate; the schedule scales it.",
	}),
	lr_scheduler_type: choice(SCHEDULE_NAMES, {
		group: "Optimizer",
		default: "linear",
		description: "The learning rate's schedule, as in transformers.",
	}),
	lr_scheduler_kwargs: map({
		group: "Optimizer",
		description:
			"Further settings of the schedule by their names in transformers: `num_cycles`, `power`, `lr_end`, `min_lr`, `min_lr_rate`, `warmup_lr_rate`, `timescale`, `num_decay_steps`, `num_stable_steps`, `warmup_type`, `decay_type`, `min_lr_ratio`.",
	}),
	warmup_steps: stepsOrRatio({
		group: "Optimizer",
		zero: true,
		default: 0,
		description: "Steps in which the learning rate rises from 0.",
	}),
	weight_decay: number({
		group: "Optimizer",
		default: 0,
		min: 0,
		description: "AdamW's weight decay; biases and norms have none, as in transformers.",
	}),
	adam_beta1: number({
		group: "Optimizer",
		default: 0.9,
		min: 0,
		below: 1,
		description: "Decay of AdamW's first moment.",
	}),
	adam_beta2: number({
		group: "Optimizer",
		default: 0.999,
		min: 0,
		below: 1,
		description: "Decay of AdamW's second moment.",
	}),
	adam_epsilon: number({
		group: "Optimizer",
		default: 1e-8,
		above: 0,
		description: "AdamW's term against division by zero.",
	}),
	max_grad_norm: number({
		group: "Optimizer",
		default: 1,
		min: 0,
		description: "Gradients are scaled down to this norm where theirs is larger; 0: never.",
	}),
	optim: choice(["adamw_torch", "adamw_torch_fused"], {
		group: "Optimizer",
		default: "adamw_torch_fused",
		description: "The optimizer. Both names are one AdamW here, with moments in float32, or in bfloat16 with `bf16_moments`.",
	}),
};

const precision = {
	bf16: custom(
		z
			.union([z.boolean(), z.literal("auto"), z.null()])
			.default("auto")
			.transform((value): boolean | "auto" => value ?? "auto"),
		{
			group: "Precision and memory",
			kind: "boolean",
			expects: "true, false or auto",
			default: "auto",
			switch: true,
			description:
				"Compute with bfloat16 weights and activations, float32 sums and float32 master weights; off is float32 throughout, or float16 with `fp16`. Auto: on a GPU, where it is the fast way, and not on a CPU or with `fp16`, where float32 is the exact and, without AVX512-BF16, the faster one. A run that goes on computes as it began.",
		},
	),
	fp16: boolean({
		group: "Precision and memory",
		default: false,
		description:
			"Compute with float16 weights and activations, float32 sums and whole float32 master weights, and scale the loss as PyTorch's GradScaler does: from 65536 on, doubled after 2,000 good steps, halved at each step whose loss or gradient is not finite. Such a step changes no weight and does not move the schedule of the learning rate. `bf16` needs none of this and 2 bytes a parameter less.",
	}),
	bf16_stochastic_round: boolean({
		group: "Precision and memory",
		default: false,
		description:
			"With `bf16`: keep no master weights, which saves 2 bytes a parameter, and round each update up or down at random (drawn from `seed`), so that updates too small for bfloat16 move weights on average. The exact master weights of the default train more smoothly.",
	}),
	bf16_moments: boolean({
		group: "Precision and memory",
		default: false,
		description:
			"Keep AdamW's moments in bfloat16, which saves 4 bytes a parameter, and round them up or down at random (drawn from `seed`), so that changes too small for bfloat16 add up on average. With `bf16_stochastic_round` and the gradient, 10 bytes a parameter are kept instead of 16.",
	}),
	gradient_checkpointing: custom(
		z
			.union([z.boolean(), z.enum(["off", "norms", "mlp", "block"])])
			.default("norms")
			.transform((value): "off" | "norms" | "mlp" | "block" =>
				value === true ? "block" : value === false ? "off" : value,
			),
		{
			group: "Precision and memory",
			kind: "choice",
			expects: "one of off, norms, mlp, block; true is block, false is off",
			default: "norms",
			choices: ["off", "norms", "mlp", "block", "true", "false"],
			switch: true,
			description:
				"What is computed again in the backward pass instead of kept: nothing; norms and SwiGLU (2 to 4 % more work); the MLP too; the whole block. It changes memory and speed, never the result.",
		},
	),
	loss_seq_chunk_size: integerOrNone({
		group: "Precision and memory",
		min: 1,
		description:
			"Target tokens whose logits exist at once; none: as many as keep them near 32 MB, on a GPU near 1.2 GB, but no fewer than 256.",
	}),
	activation_offloading: boolean({
		group: "Precision and memory",
		default: false,
		description:
			"On a GPU: keep the layers' inputs in the host's memory between forward and backward pass. It changes memory and speed, never the result; on the CPU there is nothing to move.",
	}),
	optimizer_offload: boolean({
		group: "Precision and memory",
		default: false,
		description:
			"On a GPU: keep AdamW's moments, and the master weights of bfloat16 or float16, in the host's memory. It changes memory and speed, never the result; on the CPU there is nothing to move.",
	}),
	attention: choice(["auto", "cudnn", "own"], {
		group: "Precision and memory",
		default: "own",
		description:
			"On a GPU: who computes attention. own is this program's kernels: equal bits every time. cudnn is NVIDIA's cuDNN, for bf16 and heads of 64 or 128 elements on GPUs of compute capability 9.0 and 10.x: not equal in bits from run to run, and an error where it cannot be used. auto is cudnn where it can be used, else own, and says so.",
	}),
};

const checkpoints = {
	output_dir: requiredString({
		group: "Checkpoints",
		expects: "a folder",
		description: "Folder of the run: checkpoints, metrics.jsonl and the trained model.",
	}),
	overwrite_output_dir: boolean({
		group: "Checkpoints",
		default: false,
		description:
			"Start anew in an `output_dir` that holds another run, and remove that run's checkpoints. Without it such a folder is an error.",
	}),
	save_strategy: choice(["no", "steps", "epoch"], {
		group: "Checkpoints",
		default: "steps",
		description:
			"When a checkpoint is written: every `save_steps` and at the end, after each epoch, or never. A run that is stopped writes one in any case, and one that is done leaves the model in `output_dir`.",
	}),
	save_steps: stepsOrRatio({
		group: "Checkpoints",
		zero: false,
		default: 500,
		description: "Steps from one checkpoint to the next.",
	}),
	save_total_limit: integerOrNone({
		group: "Checkpoints",
		min: 1,
		description: "Checkpoints that are kept; the oldest goes once a new one stands. None: all.",
	}),
	resume_from_checkpoint: custom(
		z
			.union([z.boolean(), z.string().min(1), z.null()])
			.default(null)
			.transform((value): string | null => (value === true ? "latest" : value === false ? null : value)),
		{
			group: "Checkpoints",
			kind: "string",
			expects: "latest (or true), a checkpoint's folder, or none",
			default: "none",
			switch: true,
			description: "Go on with a run at the exact sample and state of its newest or a given checkpoint.",
		},
	),
};

const output = {
	run_name: stringOrNone({
		group: "Output",
		description: "A name for the run in its metrics.",
	}),
	logging_steps: stepsOrRatio({
		group: "Output",
		zero: false,
		default: 10,
		description: "Steps from one line of metrics to the next.",
	}),
	logging_first_step: boolean({
		group: "Output",
		default: false,
		description: "Report the first step too.",
	}),
	disable_tqdm: boolean({
		group: "Output",
		default: false,
		description: "Plain lines on a terminal too, in place of the live line.",
	}),
	report_to: only("none", {
		group: "Output",
		kind: "choice",
		others: [],
		why: "other sinks are not built yet; metrics.jsonl is always written",
		description: "Where metrics go besides metrics.jsonl.",
	}),
};

const NO_RANKS = "one device only: training on several devices is not built yet";

function ranks(description: string) {
	return only(1, { group: "Several devices", kind: "integer", why: NO_RANKS, description });
}

const devices = {
	dp_size: ranks("Data-parallel ranks."),
	tp_size: ranks("Tensor-parallel ranks."),
	pp_size: ranks("Pipeline-parallel ranks."),
	ep_size: ranks("Expert-parallel ranks."),
	cp_size: ranks("Context-parallel ranks."),
};

const agentrl = {
	enable_sampling: only(false, {
		group: "AgentRL",
		kind: "boolean",
		why: "supervised fine-tuning draws no samples; rows come from train_file",
		description: "Sample new trajectories while training.",
	}),
	loss_calculater: only("CrossEntropy", {
		group: "AgentRL",
		kind: "choice",
		others: [],
		why: "other losses are not built",
		description: "The loss (spelt as in AgentRL).",
	}),
	eval_strategy: only("no", {
		group: "AgentRL",
		kind: "choice",
		others: [],
		why: "evaluation while training is not built; `arl generate` scores a checkpoint",
		description: "When to evaluate while training.",
	}),
};

/** The schema of a training run. Unknown keys are refused. */
export const trainingSchema = z.strictObject({
	...model,
	...rows,
	...images,
	...database,
	...text,
	...batch,
	...optimizer,
	...precision,
	...checkpoints,
	...output,
	...devices,
	...agentrl,
});

/** Options as a user may write them: in `arl.config.ts`, a file, or an object. */
export type AgentTrainingConfigInput = z.input<typeof trainingSchema>;

/** Options as the trainer sees them: every one has a value. */
export type AgentTrainingConfig = z.output<typeof trainingSchema>;

/** The name of an option. */
export type OptionName = keyof AgentTrainingConfig;

/** Every option's name, in the order of the schema. */
export const OPTION_NAMES = Object.keys(trainingSchema.shape) as OptionName[];
