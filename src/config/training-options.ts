/** The options of a training run. Generated from the schema (`npm run docs:options`). */

type JsonValue = string | number | boolean | null | JsonValue[] | { [name: string]: JsonValue };

/** Options as a user writes them: in `arl.config.ts`, a file, or an object. What a description calls none is `null` here. */
export interface TrainingOptions {
	// Model

	/**
	 * Folder of the model in Hugging Face's layout: config.json, safetensors weights, tokenizer.json and a chat
	 * template. Or its name on the Hub, such as `Qwen/Qwen3-0.6B` or `OWNER/NAME@REVISION`: what the Hub's cache lacks
	 * is fetched into it. A local folder of that name comes first; `hf://OWNER/NAME` always means the Hub. Expected: a
	 * folder, or OWNER/NAME of the Hugging Face Hub.
	 */
	model_name_or_path: string;
	/**
	 * Start from random weights drawn with `seed` instead of the folder's. Without it a folder that has no weights is an
	 * error. Expected: true or false.
	 * @default false
	 */
	init_from_config?: boolean;
	/**
	 * Where the engine runs: on the CPU, on the first usable GPU, or on the GPU with that number. Auto: on a GPU if one
	 * is usable, else on the CPU. `arl doctor` lists the devices. Expected: auto, cpu, cuda or cuda:N. Files and flags
	 * may call it `no_cuda` or `use_cpu`.
	 * @default "auto"
	 */
	device?: string;
	/**
	 * Compute threads; none: as many as the process may use. Expected: a whole number, 1 or more and at most 1024; or
	 * none.
	 * @default null
	 */
	threads?: number | null;

	// Rows

	/**
	 * Files of rows: JSONL, JSON, Parquet or CSV, plain or compressed with gzip or zstd; the content of a file decides,
	 * not its name. From a folder the files of `split` are read. `hf://datasets/OWNER/NAME/PATH` (or `NAME@REVISION`) is
	 * a file, folder or glob of a data set on the Hugging Face Hub. Several entries are read in turn, or mixed by
	 * `train_weights`. Expected: files, folders or globs.
	 * @default []
	 */
	train_file?: string | string[];
	/**
	 * Split to train on: from a folder, the files with this name in theirs; from a database, the documents of this
	 * split, and for train also those without one. None: all rows. Expected: a name such as train, validation or test;
	 * or none.
	 * @default "train"
	 */
	split?: string | null;
	/**
	 * Relative share of each entry of `train_file` in an epoch, in the same order; none: every row of every file once.
	 * Expected: numbers above 0, one for each entry.
	 * @default []
	 */
	train_weights?: number[];
	/**
	 * The most rows to use from each entry of `train_file`, in the same order, drawn once with `data_seed`. None for an
	 * entry: no bound. Expected: whole numbers of 1 or more, or none, one for each entry.
	 * @default []
	 */
	train_caps?: number | null | "none" | (number | null | "none")[];
	/**
	 * Module (.ts or .js) whose default export is a data set of rows, or a function of `{ args, split }` that returns
	 * one. Next to `train_file` it counts as one more entry, the last. Expected: a file; or none.
	 * @default null
	 */
	dataset?: string | null;
	/**
	 * Module (.ts or .js) whose default export converts a raw row: to one row, to several in a list, or to null to leave
	 * it out. Expected: a file; or none.
	 * @default null
	 */
	convert?: string | null;
	/**
	 * Names of columns that differ from the known ones, for example `prompt=question completion=answer`. Otherwise the
	 * first rows show the shape of all. Expected: names and columns, as JSON or as NAME=COLUMN ....
	 * @default {}
	 */
	columns?: Record<string, string>;
	/**
	 * What happens if a row cannot be used. error: the run stops before training. skip: the row is left out. Either way
	 * it is reported with file, line and reason. Expected: one of error, skip.
	 * @default "error"
	 */
	on_bad_row?: "error" | "skip";
	/**
	 * Order of the rows: shuffled for each epoch with `data_seed`, or as in the files. Expected: one of random,
	 * sequential. Files and flags may call it `group_by_length`.
	 * @default "random"
	 */
	train_sampling_strategy?: "random" | "sequential";
	/**
	 * Replies with a lower advantage are not trained; none: no bound. Expected: a number; or none.
	 * @default null
	 */
	minimal_advantage?: number | null;
	/**
	 * Do not train replies whose advantage is 0. Expected: true or false.
	 * @default false
	 */
	drop_zero_advantage?: boolean;
	/**
	 * Do not train replies whose advantage is 0 or lower. Expected: true or false.
	 * @default false
	 */
	skip_non_positive_advantage?: boolean;
	/**
	 * Folder for the tokens of encoded rows, and for rows while they are unpacked; none: `.cache` in `output_dir`.
	 * Expected: a folder; or none.
	 * @default null
	 */
	cache_dir?: string | null;
	/**
	 * How long rows are encoded and checked before the first step; the others are encoded while the first steps compute.
	 * None: 20, or 0.2 if all rows come from a database. Expected: a number, 0 or more; or none.
	 * @default null
	 */
	preprocess_seconds?: number | null;

	// Images

	/**
	 * What happens to the images of rows. train: the model sees them, which needs a model with a vision tower. error: a
	 * row with an image cannot be used. drop: images are left out of the text, counted and reported. auto: train if the
	 * model has a tower and one of the first rows has an image, else error. Expected: one of auto, train, error, drop.
	 * @default "auto"
	 */
	images?: "auto" | "train" | "error" | "drop";
	/**
	 * Parts of a model with a vision tower that are not trained, while images are: the tower (vision), what makes tokens
	 * of its output (merger), the rest (language). A frozen part needs neither gradients nor moments, and comes out as
	 * it went in. Expected: one or several of vision, merger, language; or none.
	 * @default []
	 */
	freeze?: "none" | "vision" | "merger" | "language" | ("none" | "vision" | "merger" | "language")[];
	/**
	 * Images with fewer pixels are scaled up to about this many before the model sees them; none: as the model's
	 * preprocessor_config.json says. Expected: a whole number, 1 or more and at most 178956970; or none.
	 * @default null
	 */
	min_pixels?: number | null;
	/**
	 * Images with more pixels are scaled down to about this many, so that each takes fewer tokens; none: as the model's
	 * preprocessor_config.json says. Expected: a whole number, 1 or more and at most 178956970; or none.
	 * @default null
	 */
	max_pixels?: number | null;
	/**
	 * Folder below which images are read from files. Paths in rows that are not absolute start there. None: images in
	 * files are refused. Expected: a folder; or none.
	 * @default null
	 */
	image_root?: string | null;
	/**
	 * Fetch images from this machine and from private networks too. Expected: true or false.
	 * @default false
	 */
	image_allow_private?: boolean;
	/**
	 * Largest file of an image in bytes. Expected: a whole number, 1 or more.
	 * @default 20971520
	 */
	image_max_bytes?: number;
	/**
	 * Seconds for one attempt at an image; a failure that may pass is tried five times. Expected: a number, above 0 and
	 * at most 3600.
	 * @default 30
	 */
	image_timeout?: number;
	/**
	 * Folder that keeps fetched images, up to 10 GiB, so that later epochs and runs do not fetch them again; none:
	 * `images` in `cache_dir`. Expected: a folder; or none.
	 * @default null
	 */
	image_cache_dir?: string | null;

	// Database

	/**
	 * MongoDB database to read rows from, in addition to or instead of `train_file`. If no rows are given, the
	 * environment variable `ARL_DB_CONNECTION_STRING` is used. It is never shown. Expected:
	 * mongodb://USER:PASSWORD@HOST:PORT/DATABASE; or none. Files and flags may call it `db_uri`.
	 * @default null
	 */
	db_connection_string?: string | null;
	/**
	 * Collection of the rows; auto: whichever of the two has rows. Expected: one of auto, Record, DBRecordData. Files
	 * and flags may call it `db_collection`.
	 * @default "auto"
	 */
	db_source?: "auto" | "Record" | "DBRecordData";
	/**
	 * A further condition on the documents, as Extended JSON: `'{"meta_infos.source": "web"}'`. Expected: a MongoDB
	 * query as JSON, or FIELD=VALUE ....
	 * @default {}
	 */
	db_match?: Record<string, JsonValue>;
	/**
	 * Documents that were trained this often before the run are left out. Rows of files have no such count;
	 * `num_train_epochs` sets how often a run trains each row. Expected: a whole number, 1 or more.
	 * @default 1
	 */
	max_trained_count?: number;
	/**
	 * The fewest steps between two trainings of a row: documents whose `last_trained_step` is closer to the last step in
	 * the collection are left out, and epochs that would repeat a row sooner are refused. Expected: a whole number, 1 or
	 * more.
	 * @default 1
	 */
	retrained_interval?: number;
	/**
	 * What is written back once a checkpoint is complete. ack: `trained_count` and `last_trained_step` of its rows,
	 * exactly once per row and epoch, with a ledger in `arl_acks`. agentrl: only fields that AgentRL knows, and no
	 * collection of its own; exact as long as one run at a time trains a row. None: nothing. Nothing is ever deleted.
	 * Expected: one of ack, agentrl, none.
	 * @default "ack"
	 */
	mongo_write_back?: "ack" | "agentrl" | "none";
	/**
	 * Train rows as they arrive: the rows of the database and those that arrive during the run, each leased for this run
	 * alone and trained once, in the order of the leases. Needs `max_steps` and `train_sampling_strategy sequential`.
	 * Expected: true or false.
	 * @default false
	 */
	follow?: boolean;
	/**
	 * Seconds without a new row after which a run that follows a database trains the remaining rows and ends; none: it
	 * waits until `max_steps` are done. Expected: a number, above 0; or none.
	 * @default null
	 */
	follow_idle?: number | null;

	// Text

	/**
	 * Jinja chat template that replaces the checkpoint's own. Expected: a file; or none. Files and flags may call it
	 * `chat_template_path`.
	 * @default null
	 */
	chat_template?: string | null;
	/**
	 * The date for chat templates that call `strftime_now`; none: today, in UTC. A run that is resumed on another day
	 * needs the date of its start. Expected: a date such as 2024-02-29; or none.
	 * @default null
	 */
	chat_template_date?: string | null;
	/**
	 * What happens to reasoning in assistant messages: kept in all, stripped from all, or kept in the last one; none: as
	 * the template does. Expected: one of keep, strip, last; or none.
	 * @default null
	 */
	thinking?: "keep" | "strip" | "last" | null;
	/**
	 * Longest sample in tokens; none: the model's `max_position_embeddings`. Expected: a whole number, 2 or more; or
	 * none. Files and flags may call it `max_seq_length`.
	 * @default null
	 */
	max_length?: number | null;
	/**
	 * What happens to a longer sample. error: the run stops before training. drop: the row is left out. left and right:
	 * the sample is cut at that end. Each is reported. Expected: one of error, drop, left, right. Files and flags may
	 * call it `truncation_mode`.
	 * @default "error"
	 */
	truncation?: "error" | "drop" | "left" | "right";

	// Batch and length of the run

	/**
	 * Samples in a micro-batch. They are packed next to each other without padding. Expected: a whole number, 1 or more
	 * and at most 65536. Files and flags may call it `per_gpu_train_batch_size`.
	 * @default 8
	 */
	per_device_train_batch_size?: number;
	/**
	 * Packing: fill each micro-batch with samples up to this many tokens instead of counting samples. Samples never see
	 * each other, so the same samples give the same loss either way. Expected: a whole number, 2 or more and at most
	 * 16777216; or none.
	 * @default null
	 */
	max_tokens_per_micro_batch?: number | null;
	/**
	 * Micro-batches in an optimizer step. The loss is the mean over all target tokens of the step, however it is split.
	 * Expected: a whole number, 1 or more and at most 65536.
	 * @default 1
	 */
	gradient_accumulation_steps?: number;
	/**
	 * How often all rows are trained; a fraction ends within an epoch. Expected: a number, above 0 and at most 1000000.
	 * @default 3
	 */
	num_train_epochs?: number;
	/**
	 * Optimizer steps in total, instead of `num_train_epochs`; -1: as many as the epochs have. Expected: a whole number
	 * of 1 or more, or -1.
	 * @default -1
	 */
	max_steps?: number;
	/**
	 * Seed of everything random. Expected: a whole number, 0 or more and at most 4294967295.
	 * @default 42
	 */
	seed?: number;
	/**
	 * Seed of the row order; none: `seed`. Expected: a whole number, 0 or more and at most 4294967295; or none.
	 * @default null
	 */
	data_seed?: number | null;

	// Optimizer

	/**
	 * The highest learning rate; the schedule scales it. Expected: a number, 0 or more.
	 * @default 0.00002
	 */
	learning_rate?: number;
	/**
	 * Schedule of the learning rate, as in transformers. reduce_lr_on_plateau and greedy follow `metric_for_best_model`
	 * of the evaluations, and do not warm up. Expected: one of linear, cosine, cosine_with_restarts, polynomial,
	 * constant, constant_with_warmup, inverse_sqrt, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay,
	 * reduce_lr_on_plateau, greedy.
	 * @default "linear"
	 */
	lr_scheduler_type?:
		| "linear"
		| "cosine"
		| "cosine_with_restarts"
		| "polynomial"
		| "constant"
		| "constant_with_warmup"
		| "inverse_sqrt"
		| "cosine_with_min_lr"
		| "cosine_warmup_with_min_lr"
		| "warmup_stable_decay"
		| "reduce_lr_on_plateau"
		| "greedy";
	/**
	 * Further settings of the schedule, by their names in transformers: `num_cycles`, `power`, `lr_end`, `min_lr`,
	 * `min_lr_rate`, `warmup_lr_rate`, `timescale`, `num_decay_steps`, `num_stable_steps`, `warmup_type`, `decay_type`,
	 * `min_lr_ratio`; of reduce_lr_on_plateau and greedy `mode`, `factor`, `patience`, `threshold`, `threshold_mode`,
	 * `cooldown`, `min_lr`, `eps`, and of greedy `warmup`, `max_lr`, `smooth`, `window_size`, `reset_start`. Expected:
	 * names and values, as JSON or as NAME=VALUE ....
	 * @default {}
	 */
	lr_scheduler_kwargs?: Record<string, string | number | boolean | null>;
	/**
	 * Steps over which the learning rate rises from 0. Expected: 0, a whole number of steps, or a part of all steps
	 * (above 0 and below 1). Files and flags may call it `warmup_ratio`.
	 * @default 0
	 */
	warmup_steps?: number;
	/**
	 * AdamW's weight decay; biases and norms have none, as in transformers. Expected: a number, 0 or more.
	 * @default 0
	 */
	weight_decay?: number;
	/**
	 * Decay of AdamW's first moment. Expected: a number, 0 or more and below 1.
	 * @default 0.9
	 */
	adam_beta1?: number;
	/**
	 * Decay of AdamW's second moment. Expected: a number, 0 or more and below 1.
	 * @default 0.999
	 */
	adam_beta2?: number;
	/**
	 * AdamW's term against division by zero. Expected: a number, above 0.
	 * @default 1e-8
	 */
	adam_epsilon?: number;
	/**
	 * Gradients with a larger norm are scaled down to this one; 0: never. Expected: a number, 0 or more.
	 * @default 1
	 */
	max_grad_norm?: number;
	/**
	 * The optimizer. Both names mean the same AdamW here, with moments in float32, or in bfloat16 with `bf16_moments`.
	 * Expected: one of adamw_torch, adamw_torch_fused.
	 * @default "adamw_torch_fused"
	 */
	optim?: "adamw_torch" | "adamw_torch_fused";

	// LoRA

	/**
	 * Train adapters of low rank (LoRA) next to the frozen weights. The run leaves an adapter's folder that PEFT and
	 * vLLM load; `arl merge` makes a model of it. Expected: true or false.
	 * @default false
	 */
	use_peft?: boolean;
	/**
	 * Rank of the adapters. Expected: a whole number, 1 or more and at most 65536.
	 * @default 16
	 */
	lora_r?: number;
	/**
	 * An adapter counts `lora_alpha / lora_r` times; with `use_rslora` `lora_alpha` over the root of `lora_r`. Expected:
	 * a number, above 0.
	 * @default 32
	 */
	lora_alpha?: number;
	/**
	 * Probability with which an element of an adapter's input is dropped in training. Above 0 each layer needs passes
	 * and memory of its own; 0 is the fastest. Expected: a number, 0 or more and below 1.
	 * @default 0.05
	 */
	lora_dropout?: number;
	/**
	 * Layers that get an adapter: all-linear (every linear layer but the head; of a mixture of experts the experts and
	 * the router too, with `lora_dropout 0`), names such as `q_proj v_proj`, of which a layer's full name is one or ends
	 * with one after a dot, or one regular expression over full names. None: q_proj and v_proj, as in PEFT. Expected:
	 * all-linear, names of layers, or one regular expression.
	 * @default []
	 */
	lora_target_modules?: string | string[];
	/**
	 * Parameters of experts that get an adapter, by the ends of their names: `mlp.experts.gate_up_proj
	 * mlp.experts.down_proj`. They need `lora_dropout 0`, as in PEFT. Expected: names of parameters.
	 * @default []
	 */
	lora_target_parameters?: string | string[];
	/**
	 * Modules of which a whole copy is trained and saved with the adapter, for example `embed_tokens lm_head`. If the
	 * head is tied to the embedding, a copy of either unties them. Expected: names of modules.
	 * @default []
	 */
	lora_modules_to_save?: string | string[];
	/**
	 * Divide `lora_alpha` by the root of the rank instead of the rank. Expected: true or false.
	 * @default false
	 */
	use_rslora?: boolean;
	/**
	 * Train the magnitudes of the adapted layers' rows as well (DoRA). Needs `lora_dropout 0`; each step computes the
	 * layers' products once more. Expected: true or false.
	 * @default false
	 */
	use_dora?: boolean;
	/**
	 * Keep the frozen weights of linear layers in 4 bits (NF4, with the numbers of bitsandbytes), quantized when they
	 * are read: 4.5 bits a weight, or 4.13 with `use_bnb_nested_quant`. Products take them in the type of the
	 * activations, a tile at a time. Adapters are trained next to them (QLoRA). A folder that bitsandbytes wrote in NF4
	 * is opened so in any case. Expected: true or false.
	 * @default false
	 */
	load_in_4bit?: boolean;
	/**
	 * With `load_in_4bit`: keep the scales of such weights in 8 bits (double quantization). Expected: true or false.
	 * @default false
	 */
	use_bnb_nested_quant?: boolean;
	/**
	 * Folder of an adapter, by PEFT or of an earlier run, to train on. Its adapter_config.json takes the place of
	 * `use_peft` and of the other options of adapters. Expected: a folder; or none.
	 * @default null
	 */
	adapter_name_or_path?: string | null;
	/**
	 * At the end, write the model with the adapter merged into it to `merged` in `output_dir`. Expected: true or false.
	 * @default false
	 */
	merge_adapter?: boolean;

	// Precision and memory

	/**
	 * Compute with bfloat16 weights and activations, float32 sums and float32 master weights; off is float32 throughout,
	 * or float16 with `fp16`. Auto: on for a GPU, where it is fast, and off with `fp16` and for the CPU, where float32
	 * is exact and, without AVX512-BF16, faster. A resumed run computes as it began. Expected: true, false or auto.
	 * @default "auto"
	 */
	bf16?: boolean | "auto" | null;
	/**
	 * Compute with float16 weights and activations, float32 sums and whole float32 master weights, and scale the loss as
	 * PyTorch's GradScaler does: first by 65536, twice as much after 2,000 good steps, half as much after each step
	 * whose loss or gradient is not finite. Such a step changes no weight and does not advance the schedule of the
	 * learning rate. `bf16` needs none of this and 2 bytes a parameter less. Expected: true or false.
	 * @default false
	 */
	fp16?: boolean;
	/**
	 * With `bf16`: keep no master weights, which saves 2 bytes a parameter, and round each update up or down at random
	 * (drawn from `seed`), so that updates too small for bfloat16 move weights on average. The exact master weights of
	 * the default give a smoother training. Expected: true or false.
	 * @default false
	 */
	bf16_stochastic_round?: boolean;
	/**
	 * Keep AdamW's moments in bfloat16, which saves 4 bytes a parameter, and round them up or down at random (drawn from
	 * `seed`), so that changes too small for bfloat16 add up on average. With `bf16_stochastic_round` a parameter takes
	 * 10 bytes instead of 16, its gradient included. Expected: true or false.
	 * @default false
	 */
	bf16_moments?: boolean;
	/**
	 * With `bf16` or `fp16`: round the logits of the loss to 16 bits, as transformers and Liger do; the sums over them
	 * stay float32. It halves the memory of the logits. A token's loss changes by at most 1/128 (bfloat16) or 1/1024
	 * (float16) of the greatest of its logits, either way. Expected: true or false.
	 * @default false
	 */
	logits_16bit?: boolean;
	/**
	 * What the backward pass recomputes instead of keeping: nothing; norms and SwiGLU (2 to 4 % more work); the MLP too;
	 * the whole block. It changes memory and speed, never the result. Expected: one of off, norms, mlp, block; true is
	 * block, false is off. Files and flags may call it `activation_checkpointing`.
	 * @default "norms"
	 */
	gradient_checkpointing?: boolean | "off" | "norms" | "mlp" | "block";
	/**
	 * Target tokens whose logits exist at once; none: a multiple of 256 whose logits take about 32 MB, on a GPU about
	 * 1.2 GB, or 4,096 or 8,192 if its memory holds them. Expected: a whole number, 1 or more; or none.
	 * @default null
	 */
	loss_seq_chunk_size?: number | null;
	/**
	 * On a GPU: keep the layers' inputs in host memory between forward and backward pass. It changes memory and speed,
	 * never the result, and has no effect on the CPU. Expected: true or false.
	 * @default false
	 */
	activation_offloading?: boolean;
	/**
	 * On a GPU: keep AdamW's moments, and the master weights of bfloat16 or float16, in host memory. It changes memory
	 * and speed, never the result, and has no effect on the CPU. Expected: true or false.
	 * @default false
	 */
	optimizer_offload?: boolean;
	/**
	 * On a GPU: which kernels compute attention. own: those of this program, which give equal bits every time. cudnn:
	 * NVIDIA's cuDNN, for bf16 and heads of 64 or 128 elements on GPUs of compute capability 9.0 and 10.x; its bits
	 * differ from run to run, and it is an error if it cannot be used. auto: cudnn if it can be used, else own, with a
	 * notice. Expected: one of auto, cudnn, own.
	 * @default "own"
	 */
	attention?: "auto" | "cudnn" | "own";
	/**
	 * On a GPU: choose the algorithm of each large matrix product by measurement, the first time that its shape occurs,
	 * and keep the choice in the build cache and in checkpoints. Equal choices give equal bits; off, cuBLASLt's first
	 * proposal is taken, which depends on its version and the GPU alone. Expected: true or false.
	 * @default true
	 */
	matmul_autotune?: boolean;

	// Evaluation

	/**
	 * When to evaluate the held-out rows: never, every `eval_steps`, or after each epoch. Expected: one of no, steps,
	 * epoch. Files and flags may call it `evaluation_strategy`.
	 * @default "no"
	 */
	eval_strategy?: "no" | "steps" | "epoch";
	/**
	 * Held-out rows, in every form that `train_file` takes. With several entries each also gets its own figures,
	 * `eval_NAME_loss` and so on; the name of an entry without one is that of its file. A path with `=` in it is written
	 * as ./PATH. Expected: files, folders or globs, each as PATH or NAME=PATH.
	 * @default []
	 */
	eval_file?: string | string[];
	/**
	 * Rows to hold out of those that are given. A part: such a share of the rows of `train_file`, chosen by a hash of
	 * `data_seed` and each row's content, and not trained. A name: from each folder of `train_file` and from the
	 * database the rows of this split. Expected: a part of all rows (above 0 and below 1), or the name of a split such
	 * as validation; or none.
	 * @default null
	 */
	eval_split?: number | string | null;
	/**
	 * Steps between evaluations with `eval_strategy steps`; none: `logging_steps`. Expected: a whole number of steps, or
	 * a part of all steps (above 0 and below 1); or none.
	 * @default null
	 */
	eval_steps?: number | null;
	/**
	 * No evaluation before so many steps (with `eval_strategy steps`) or epochs (with `eval_strategy epoch`) are done.
	 * Expected: a number, 0 or more.
	 * @default 0
	 */
	eval_delay?: number;
	/**
	 * Evaluate once before the first step too. Expected: true or false.
	 * @default false
	 */
	eval_on_start?: boolean;
	/**
	 * Held-out rows evaluated at a time, unless `max_tokens_per_micro_batch` counts tokens. It changes memory and speed,
	 * never the result. Expected: a whole number, 1 or more and at most 65536. Files and flags may call it
	 * `per_gpu_eval_batch_size`.
	 * @default 8
	 */
	per_device_eval_batch_size?: number;
	/**
	 * Held-out rows whose replies are generated at each evaluation, spread evenly over all: `eval_exact_match` is the
	 * share that equals the expected ones (tool calls as JSON, text exactly), and metrics.jsonl has their texts.
	 * Expected: a whole number, 0 or more and at most 1000000.
	 * @default 0
	 */
	eval_generate?: number;
	/**
	 * With `eval_generate`: module (.ts or .js) whose default export is a function of `(row, reply)` that returns a
	 * number, reported as `eval_metric`, or numbers by name, reported as `eval_NAME`; means over all replies. Expected:
	 * a file; or none.
	 * @default null
	 */
	eval_metric?: string | null;
	/**
	 * Leave the best checkpoint's model in `output_dir` at the end, not the last one's. Each checkpoint must then have
	 * an evaluation: the same `save_strategy` as `eval_strategy`, with `save_steps` a multiple of `eval_steps`, or
	 * `save_strategy best`. Expected: true or false.
	 * @default false
	 */
	load_best_model_at_end?: boolean;
	/**
	 * What decides which evaluation is the best, with or without `eval_` in front; none: loss. Expected: a figure of the
	 * evaluation, such as loss, mean_token_accuracy, perplexity or NAME_loss; or none.
	 * @default null
	 */
	metric_for_best_model?: string | null;
	/**
	 * Whether a greater `metric_for_best_model` is better; none: unless its name ends in loss, perplexity or entropy.
	 * Expected: true, false or none.
	 * @default null
	 */
	greater_is_better?: boolean | null;
	/**
	 * End the run after so many evaluations in a row without a better `metric_for_best_model`; none: never. The model is
	 * saved as after all steps. Expected: a whole number, 1 or more; or none.
	 * @default null
	 */
	early_stopping_patience?: number | null;
	/**
	 * With `early_stopping_patience`: how much the metric must change for the better for an evaluation to count as
	 * better. Expected: a number, 0 or more.
	 * @default 0
	 */
	early_stopping_threshold?: number;

	// Checkpoints

	/**
	 * Folder of the run: checkpoints, metrics.jsonl and the trained model. Expected: a folder.
	 */
	output_dir: string;
	/**
	 * Start from scratch in an `output_dir` that holds another run or a model, which is removed once the new run has its
	 * first checkpoint or model. Without this option such a folder is an error. Expected: true or false.
	 * @default false
	 */
	overwrite_output_dir?: boolean;
	/**
	 * When to write a checkpoint: every `save_steps` and at the end, after each epoch, after an evaluation that is the
	 * best so far, or never. A run that is stopped always writes one, and a run that is done leaves the model in
	 * `output_dir`. Expected: one of no, steps, epoch, best.
	 * @default "steps"
	 */
	save_strategy?: "no" | "steps" | "epoch" | "best";
	/**
	 * Steps between checkpoints. Expected: a whole number of steps, or a part of all steps (above 0 and below 1).
	 * @default 500
	 */
	save_steps?: number;
	/**
	 * Checkpoints to keep; the oldest is removed once a new one is complete. The best one is never removed. None: all.
	 * Expected: a whole number, 1 or more; or none.
	 * @default null
	 */
	save_total_limit?: number | null;
	/**
	 * Resume a run at the exact sample and state of its newest or a given checkpoint. Expected: latest (or true), a
	 * checkpoint's folder, or none.
	 * @default null
	 */
	resume_from_checkpoint?: boolean | string | null;

	// Output

	/**
	 * A name for the run in its metrics. Expected: a text that is not empty; or none.
	 * @default null
	 */
	run_name?: string | null;
	/**
	 * Steps between lines of metrics. Expected: a whole number of steps, or a part of all steps (above 0 and below 1).
	 * @default 10
	 */
	logging_steps?: number;
	/**
	 * Log the first step too. Expected: true or false.
	 * @default false
	 */
	logging_first_step?: boolean;
	/**
	 * Plain lines on a terminal too, instead of the live line. Expected: true or false.
	 * @default false
	 */
	disable_tqdm?: boolean;
	/**
	 * Where metrics go in addition to metrics.jsonl: TensorBoard's event files in `output_dir`, the tracking server that
	 * MLFLOW_TRACKING_URI names, the trackio server that TRACKIO_SERVER_URL names, a page that Prometheus scrapes,
	 * messages to a webhook when the run ends, fails or its loss spikes. Expected: one or several of tensorboard,
	 * mlflow, trackio, prometheus, webhook; or none.
	 * @default []
	 */
	report_to?:
		| "none"
		| "tensorboard"
		| "mlflow"
		| "trackio"
		| "prometheus"
		| "webhook"
		| ("none" | "tensorboard" | "mlflow" | "trackio" | "prometheus" | "webhook")[];
	/**
	 * With `report_to prometheus`: where the run serves the page `/metrics`. Expected: HOST:PORT.
	 * @default "127.0.0.1:9464"
	 */
	prometheus_address?: string;
	/**
	 * With `report_to webhook`: the address that messages go to, in the shape of Slack or Discord where it is theirs. If
	 * it is not given, the environment variable `ARL_WEBHOOK_URL` is used. It is never shown. Expected: an http or https
	 * address; or none.
	 * @default null
	 */
	webhook_url?: string | null;

	// Several devices

	/**
	 * Ranks on this machine: where no launcher has started them, `arl train` does, on GPUs with the `torchrun`, else
	 * with the `mpirun` that is installed. Expected: a whole number, 1 or more and at most 1024.
	 * @default 1
	 */
	nproc_per_node?: number;
	/**
	 * Data-parallel ranks; by itself what `tp_size`, `cp_size` and `pp_size` leave of those that were started: all,
	 * where these are 1. A step has this many times `gradient_accumulation_steps` micro-batches. Expected: a whole
	 * number, 1 or more and at most 65536.
	 * @default 1
	 */
	dp_size?: number;
	/**
	 * What ranks with the same weights divide among them: 0 nothing; 1 moments and master weights; 2 also gradients; 3
	 * also weights, frozen ones too, which are gathered layer by layer. Results are equal in bits. Auto: 2, or 3 with
	 * `dp_replicate_size`, and where 2 does not fit a rank's share of the memory and `tp_size`, `ep_size` and `pp_size`
	 * are 1. Expected: auto, 0, 1, 2 or 3.
	 * @default "auto"
	 */
	zero?: "auto" | 0 | 1 | 2 | 3;
	/**
	 * Seconds for which ranks wait for one that sends no sign of life, or for its gradients, before the run ends with
	 * its name. Expected: a whole number, 1 or more and at most 604800.
	 * @default 600
	 */
	ddp_timeout?: number;
	/**
	 * Equal bits every time: `attention` is own, no algorithm is chosen by measurement (`matmul_autotune`), and on the
	 * CPU gradients are summed micro-batch by micro-batch in the order of the step, so that one rank has the bits of
	 * several, which always sum so. It takes memory for the gradients once more. Expected: true or false.
	 * @default false
	 */
	full_determinism?: boolean;
	/**
	 * Replicas: groups of neighbours among the data-parallel ranks, each of which has all weights. With `zero` 3, which
	 * it asks for, a pass then gathers weights within a group, for example within a machine. Gradients, moments and
	 * master weights are divided among all ranks. It divides `dp_size`. Expected: a whole number, 1 or more and at most
	 * 65536.
	 * @default 1
	 */
	dp_replicate_size?: number;
	/**
	 * Tensor-parallel ranks: they divide the heads and the feed-forward columns of every layer, and between these the
	 * tokens of a micro-batch. Expected: a whole number, 1 or more and at most 65536.
	 * @default 1
	 */
	tp_size?: number;
	/**
	 * Pipeline-parallel ranks, or stages: each has a part of the layers. Expected: a whole number, 1 or more and at most
	 * 65536.
	 * @default 1
	 */
	pp_size?: number;
	/**
	 * Expert-parallel ranks: they divide the experts of every layer. They are among the ranks that the other sizes
	 * count: `ep_size` divides `dp_size` x `cp_size` x `tp_size`. Expected: a whole number, 1 or more and at most 65536.
	 * @default 1
	 */
	ep_size?: number;
	/**
	 * Context-parallel ranks: they divide the tokens of a micro-batch, and its heads where attention needs all tokens.
	 * Expected: a whole number, 1 or more and at most 65536.
	 * @default 1
	 */
	cp_size?: number;

	// AgentRL

	/**
	 * Sample new trajectories while training. Expected: false (supervised fine-tuning draws no samples; rows come from
	 * train_file).
	 * @default false
	 */
	enable_sampling?: false;
	/**
	 * The loss (spelt as in AgentRL). Expected: CrossEntropy (other losses are not built). Files and flags may call it
	 * `loss_calculator`.
	 * @default "CrossEntropy"
	 */
	loss_calculater?: "CrossEntropy";
}
