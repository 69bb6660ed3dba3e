/**
 * Foreign names: those that mean an option of this program, and those of Hugging Face and AgentRL that are not built. No name
 * is ignored: it is translated with a notice, accepted if its value asks for what happens anyway, or refused with the reason.
 */
import type { OptionName } from "./schema.js";

/** An older or foreign name of an option. */
export interface Alias {
	to: OptionName;
	/** The value for `to`; undefined: this value sets nothing (`no_cuda: false`). Absent: the value as it is. */
	value?: (value: unknown) => unknown;
	/** Why a value cannot be translated; undefined: it can be. */
	refuse?: (value: unknown) => string | undefined;
	/** What the flag takes; absent: what `to` takes. */
	kind?: "boolean" | "string";
}

const truthy = (value: unknown) => value === true || value === "true";

export const ALIASES: Readonly<Record<string, Alias>> = {
	warmup_ratio: {
		to: "warmup_steps",
		refuse: (value) =>
			typeof value === "number" && value >= 0 && value < 1
				? undefined
				: "expected a part of all steps (0 or more and below 1); a number of steps is `warmup_steps`",
	},
	evaluation_strategy: { to: "eval_strategy" },
	per_gpu_train_batch_size: { to: "per_device_train_batch_size" },
	per_gpu_eval_batch_size: { to: "per_device_eval_batch_size" },
	max_seq_length: { to: "max_length" },
	loss_calculator: { to: "loss_calculater" },
	chat_template_path: { to: "chat_template" },
	activation_checkpointing: { to: "gradient_checkpointing" },
	db_uri: { to: "db_connection_string" },
	db_collection: { to: "db_source" },
	no_cuda: { to: "device", kind: "boolean", value: (value) => (truthy(value) ? "cpu" : undefined) },
	use_cpu: { to: "device", kind: "boolean", value: (value) => (truthy(value) ? "cpu" : undefined) },
	group_by_length: {
		to: "train_sampling_strategy",
		kind: "boolean",
		value: (value) => (truthy(value) ? "group_by_length" : undefined),
	},
	truncation_mode: {
		to: "truncation",
		kind: "string",
		value: (value) => (value === "keep_start" ? "right" : value === "keep_end" ? "left" : value),
	},
};

/** Values that other programs accept and this one refuses, with the reason. */
export const KNOWN_VALUES: Readonly<Partial<Record<OptionName, Record<string, string>>>> = {
	report_to: {
		wandb: "Weights & Biases reads TensorBoard's files (`sync_tensorboard`), which `report_to tensorboard` writes",
		swanlab: "swanlab converts TensorBoard's files, which `report_to tensorboard` writes",
		all: "name the sinks",
	},
	train_sampling_strategy: {
		group_by_length:
			"it is not built, and there is no padding that it could save; `max_tokens_per_micro_batch` balances the micro-batches",
		batch_shuffle: "it is not built",
	},
};

/** Why an option is not built, and which of its values ask for what happens anyway. */
interface NotBuilt {
	neutral: readonly unknown[];
	why: string;
	secret?: boolean;
}

const EXACT_EVALUATION =
	"an evaluation sums over every target of the held-out rows, keeps no logits, and computes as training does";
const NO_HUB = "nothing is uploaded anywhere";
const NO_RANKS = "it is of another launcher or of PyTorch's ways to train on several devices";
const NO_DATALOADER = "rows are read, encoded and packed by the engine's own threads";
const NO_TORCH = "it concerns PyTorch, which is not used here";

function notBuilt(why: string, names: Record<string, readonly unknown[]>, secret = false): Record<string, NotBuilt> {
	return Object.fromEntries(Object.entries(names).map(([name, neutral]) => [name, { neutral, why, secret }]));
}

/** Options of TrainingArguments, SFTConfig and AgentRL that are known and not built. */
export const NOT_BUILT: Readonly<Record<string, NotBuilt>> = {
	...notBuilt("`eval_strategy` decides whether held-out rows are evaluated, and `arl generate` writes replies", {
		do_train: [true, false],
		do_eval: [true, false],
		do_predict: [false],
	}),
	...notBuilt(EXACT_EVALUATION, {
		eval_packing: [null],
		eval_accumulation_steps: [null],
		eval_do_concat_batches: [true],
		eval_use_gather_object: [false],
		prediction_loss_only: [true, false],
		batch_eval_metrics: [false],
		include_for_metrics: [],
		bf16_full_eval: [false],
		fp16_full_eval: [false],
	}),
	...notBuilt(NO_HUB, {
		push_to_hub: [false],
		hub_model_id: [null],
		hub_strategy: ["every_save"],
		hub_private_repo: [null],
		hub_always_push: [false],
		hub_revision: [null],
		project: ["huggingface"],
		trackio_space_id: [null],
		trackio_bucket_id: [null],
		trackio_static_space_id: [null],
		trust_remote_code: [false],
	}),
	...notBuilt(NO_HUB, { hub_token: [null], push_to_hub_token: [null] }, true),
	...notBuilt("the database's name is part of `db_connection_string`", { db_name: [null] }),
	...notBuilt(NO_RANKS, {
		local_rank: [-1],
		ddp_find_unused_parameters: [null, false],
		ddp_bucket_cap_mb: [null],
		ddp_broadcast_buffers: [null],
		ddp_static_graph: [null],
		ddp_backend: [null],
		fsdp: [null, ""],
		fsdp_config: [null],
		deepspeed: [null],
		accelerator_config: [null],
		parallelism_config: [null],
		average_tokens_across_devices: [true, false],
		save_on_each_node: [false],
		log_on_each_node: [true, false],
		sp_size: [1],
	}),
	...notBuilt(NO_DATALOADER, {
		dataloader_drop_last: [false],
		dataloader_num_workers: [0],
		dataloader_pin_memory: [true, false],
		dataloader_persistent_workers: [false],
		dataloader_prefetch_factor: [null],
		dataloader_multiprocessing_context: [null],
		dataloader_in_order: [true],
		dataset_num_proc: [null],
		dataset_kwargs: [null],
		remove_unused_columns: [true, false],
		label_names: [null],
		length_column_name: ["length"],
	}),
	...notBuilt(NO_TORCH, {
		torch_compile: [false],
		torch_compile_backend: [null],
		torch_compile_mode: [null],
		torch_empty_cache_steps: [null],
		tf32: [null, false],
		use_liger_kernel: [false],
		liger_kernel_config: [null],
		use_cache: [false],
		gradient_checkpointing_kwargs: [null],
		activation_checkpointing_kwargs: [null],
		model_init_kwargs: [null],
		optim_target_modules: [null],
		optim_args: [null],
		debug: [""],
		skip_memory_metrics: [true],
		enable_jit_checkpoint: [false],
		pad_to_multiple_of: [null, "auto"],
	}),
	...notBuilt("other losses are not built", {
		label_smoothing_factor: [0],
		neftune_noise_alpha: [null],
		loss_type: ["nll"],
	}),
	...notBuilt("the balance loss of a mixture of experts follows the model's config.json", {
		router_aux_loss_coef: [null],
	}),
	...notBuilt("prompts are never trained, and every assistant message is unless the row says otherwise", {
		assistant_only_loss: [true],
		completion_only_loss: [true, null],
	}),
	...notBuilt("`max_tokens_per_micro_batch` turns packing on and sets its size", {
		packing: [false],
		packing_strategy: ["bfd"],
	}),
	...notBuilt("samples are always packed next to each other without padding", { padding_free: [true, false] }),
	...notBuilt("weights in 8 bits are not built; `load_in_4bit` takes half a byte a frozen weight", {
		load_in_8bit: [false],
	}),
	...notBuilt("weights in 4 bits are NF4, two a byte", {
		bnb_4bit_quant_type: ["nf4"],
		bnb_4bit_quant_storage: [null, "uint8"],
	}),
	...notBuilt("only language models are trained", { lora_task_type: ["CAUSAL_LM"] }),
	...notBuilt("tokens that end or fill a sample come from the tokenizer's files", {
		eos_token: [null],
		pad_token: [null],
	}),
	...notBuilt("the column of plain text is named with `columns`, for example `text=body`", {
		dataset_text_field: ["text"],
	}),
	...notBuilt("`train_sampling_strategy` decides whether rows are shuffled", { shuffle_dataset: [false] }),
	...notBuilt("a batch that does not fit is refused before training, with the options to change", {
		auto_find_batch_size: [false],
	}),
	...notBuilt("metrics are written every `logging_steps`", {
		logging_strategy: ["steps"],
		include_num_input_tokens_seen: ["no", "all", true, false],
	}),
	...notBuilt("a loss that is not finite ends the run in any case", { logging_nan_inf_filter: [true, false] }),
	...notBuilt("logs go to stderr", { log_level: ["passive"], log_level_replica: ["warning"], logging_dir: [null] }),
	...notBuilt("a checkpoint always holds what is needed to resume", { save_only_model: [false] }),
	...notBuilt("checkpoints are always safetensors", { save_safetensors: [true] }),
	...notBuilt("a resumed run continues at the exact sample", {
		ignore_data_skip: [false],
		restore_callback_states_from_checkpoint: [false],
	}),
	...notBuilt("give `model_name_or_path` a folder with the tokenizer in it", { tokenizer_name_or_path: [null] }),
	...notBuilt("pass a function to `QwenTrainer` next to `args`, or name a module with `convert`", {
		convert_record_to_data_func: [null],
	}),
};
