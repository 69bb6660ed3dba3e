/** Options of the training step: batches, the optimizer, precision and memory. */
import { z } from "zod";
import { boolean, choice, custom, integer, integerOrNone, map, number, stepsOrRatio } from "../fields.js";

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

/** Those that follow evaluations. */
export const METRIC_SCHEDULE_NAMES = ["reduce_lr_on_plateau", "greedy"] as const;

export const batch = {
	per_device_train_batch_size: integer({
		default: 8,
		min: 1,
		max: 65536,
		description: "Samples in a micro-batch. They are packed next to each other without padding.",
	}),
	max_tokens_per_micro_batch: integerOrNone({
		min: 2,
		max: 16_777_216,
		description:
			"Packing: fill each micro-batch with samples up to this many tokens instead of counting samples. Samples never see each other, so the same samples give the same loss either way.",
	}),
	gradient_accumulation_steps: integer({
		default: 1,
		min: 1,
		max: 65536,
		description:
			"Micro-batches in an optimizer step. The loss is the mean over all target tokens of the step, however it is split.",
	}),
	num_train_epochs: number({
		default: 3,
		above: 0,
		max: 1_000_000,
		description: "How often all rows are trained; a fraction ends within an epoch.",
	}),
	max_steps: custom(
		z
			.int()
			.refine((value) => value === -1 || value >= 1)
			.default(-1),
		{
			kind: "integer",
			expects: "a whole number of 1 or more, or -1",
			description: "Optimizer steps in total, instead of `num_train_epochs`; -1: as many as the epochs have.",
		},
	),
	seed: integer({
		default: 42,
		min: 0,
		max: 4_294_967_295,
		description: "Seed of everything random.",
	}),
	data_seed: integerOrNone({
		min: 0,
		max: 4_294_967_295,
		description: "Seed of the row order; none: `seed`.",
	}),
};

export const optimizer = {
	learning_rate: number({
		default: 2e-5,
		min: 0,
		description: "The highest learning rate; the schedule scales it.",
	}),
	lr_scheduler_type: choice([...SCHEDULE_NAMES, ...METRIC_SCHEDULE_NAMES], {
		default: "linear",
		description:
			"Schedule of the learning rate, as in transformers. reduce_lr_on_plateau and greedy follow `metric_for_best_model` of the evaluations, and do not warm up.",
	}),
	lr_scheduler_kwargs: map({
		description:
			"Further settings of the schedule, by their names in transformers: `num_cycles`, `power`, `lr_end`, `min_lr`, `min_lr_rate`, `warmup_lr_rate`, `timescale`, `num_decay_steps`, `num_stable_steps`, `warmup_type`, `decay_type`, `min_lr_ratio`; of reduce_lr_on_plateau and greedy `mode`, `factor`, `patience`, `threshold`, `threshold_mode`, `cooldown`, `min_lr`, `eps`, and of greedy `warmup`, `max_lr`, `smooth`, `window_size`, `reset_start`.",
	}),
	warmup_steps: stepsOrRatio({
		zero: true,
		default: 0,
		description: "Steps over which the learning rate rises from 0.",
	}),
	weight_decay: number({
		default: 0,
		min: 0,
		description: "AdamW's weight decay; biases and norms have none, as in transformers.",
	}),
	adam_beta1: number({
		default: 0.9,
		min: 0,
		below: 1,
		description: "Decay of AdamW's first moment.",
	}),
	adam_beta2: number({
		default: 0.999,
		min: 0,
		below: 1,
		description: "Decay of AdamW's second moment.",
	}),
	adam_epsilon: number({
		default: 1e-8,
		above: 0,
		description: "AdamW's term against division by zero.",
	}),
	max_grad_norm: number({
		default: 1,
		min: 0,
		description: "Gradients with a larger norm are scaled down to this one; 0: never.",
	}),
	optim: choice(["adamw_torch", "adamw_torch_fused"], {
		default: "adamw_torch_fused",
		description:
			"The optimizer. Both names mean the same AdamW here, with moments in float32, or in bfloat16 with `bf16_moments`.",
	}),
};

export const precision = {
	bf16: custom(
		z
			.union([z.boolean(), z.literal("auto"), z.null()])
			.default("auto")
			.transform((value): boolean | "auto" => value ?? "auto"),
		{
			kind: "boolean",
			expects: "true, false or auto",
			switch: true,
			description:
				"Compute with bfloat16 weights and activations, float32 sums and float32 master weights; off is float32 throughout, or float16 with `fp16`. Auto: on for a GPU, where it is fast, and off with `fp16` and for the CPU, where float32 is exact and, without AVX512-BF16, faster. A resumed run computes as it began.",
		},
	),
	fp16: boolean({
		default: false,
		description:
			"Compute with float16 weights and activations, float32 sums and whole float32 master weights, and scale the loss as PyTorch's GradScaler does: first by 65536, twice as much after 2,000 good steps, half as much after each step whose loss or gradient is not finite. Such a step changes no weight and does not advance the schedule of the learning rate. `bf16` needs none of this and 2 bytes a parameter less.",
	}),
	bf16_stochastic_round: boolean({
		default: false,
		description:
			"With `bf16`: keep no master weights, which saves 2 bytes a parameter, and round each update up or down at random (drawn from `seed`), so that updates too small for bfloat16 move weights on average. The exact master weights of the default give a smoother training.",
	}),
	bf16_moments: boolean({
		default: false,
		description:
			"Keep AdamW's moments in bfloat16, which saves 4 bytes a parameter, and round them up or down at random (drawn from `seed`), so that changes too small for bfloat16 add up on average. With `bf16_stochastic_round` a parameter takes 10 bytes instead of 16, its gradient included.",
	}),
	logits_16bit: boolean({
		default: false,
		description:
			"With `bf16` or `fp16`: round the logits of the loss to 16 bits, as transformers and Liger do; the sums over them stay float32. It halves the memory of the logits. A token's loss changes by at most 1/128 (bfloat16) or 1/1024 (float16) of the greatest of its logits, either way.",
	}),
	gradient_checkpointing: custom(
		z
			.union([z.boolean(), z.enum(["off", "norms", "mlp", "block"])])
			.default("norms")
			.transform((value): "off" | "norms" | "mlp" | "block" =>
				value === true ? "block" : value === false ? "off" : value,
			),
		{
			kind: "choice",
			expects: "one of off, norms, mlp, block; true is block, false is off",
			choices: ["off", "norms", "mlp", "block", "true", "false"],
			switch: true,
			description:
				"What the backward pass recomputes instead of keeping: nothing; norms and SwiGLU (2 to 4 % more work); the MLP too; the whole block. It changes memory and speed, never the result.",
		},
	),
	loss_seq_chunk_size: integerOrNone({
		min: 1,
		description:
			"Target tokens whose logits exist at once; none: a multiple of 256 whose logits take about 32 MB, on a GPU about 1.2 GB, or 4,096 or 8,192 if its memory holds them.",
	}),
	activation_offloading: boolean({
		default: false,
		description:
			"On a GPU: keep the layers' inputs in host memory between forward and backward pass. It changes memory and speed, never the result, and has no effect on the CPU.",
	}),
	optimizer_offload: boolean({
		default: false,
		description:
			"On a GPU: keep AdamW's moments, and the master weights of bfloat16 or float16, in host memory. It changes memory and speed, never the result, and has no effect on the CPU.",
	}),
	attention: choice(["auto", "cudnn", "own"], {
		default: "own",
		description:
			"On a GPU: which kernels compute attention. own: those of this program, which give equal bits every time. cudnn: NVIDIA's cuDNN, for bf16 and heads of 64 or 128 elements on GPUs of compute capability 9.0 and 10.x; its bits differ from run to run, and it is an error if it cannot be used. auto: cudnn if it can be used, else own, with a notice.",
	}),
	matmul_autotune: boolean({
		default: true,
		description:
			"On a GPU: choose the algorithm of each large matrix product by measurement, the first time that its shape occurs, and keep the choice in the build cache and in checkpoints. Equal choices give equal bits; off, cuBLASLt's first proposal is taken, which depends on its version and the GPU alone.",
	}),
};
