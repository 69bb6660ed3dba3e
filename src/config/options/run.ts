/** Options of a run: what it writes, its devices, and further options of AgentRL. */
import { z } from "zod";
import {
	boolean,
	choice,
	choices,
	custom,
	integer,
	integerOrNone,
	only,
	requiredString,
	stepsOrRatio,
	string,
	stringOrNone,
} from "../fields.js";

export const checkpoints = {
	output_dir: requiredString({
		expects: "a folder",
		description: "Folder of the run: checkpoints, metrics.jsonl and the trained model.",
	}),
	overwrite_output_dir: boolean({
		default: false,
		description:
			"Start from scratch in an `output_dir` that holds another run or a model, which is removed once the new run has its first checkpoint or model. Without this option such a folder is an error.",
	}),
	save_strategy: choice(["no", "steps", "epoch", "best"], {
		default: "steps",
		description:
			"When to write a checkpoint: every `save_steps` and at the end, after each epoch, after an evaluation that is the best so far, or never. A run that is stopped always writes one, and a run that is done leaves the model in `output_dir`.",
	}),
	save_steps: stepsOrRatio({
		zero: false,
		default: 500,
		description: "Steps between checkpoints.",
	}),
	save_total_limit: integerOrNone({
		min: 1,
		description:
			"Checkpoints to keep; the oldest is removed once a new one is complete. The best one is never removed. None: all.",
	}),
	resume_from_checkpoint: custom(
		z
			.union([z.boolean(), z.string().min(1), z.null()])
			.default(null)
			.transform((value): string | null => (value === true ? "latest" : value === false ? null : value)),
		{
			kind: "string",
			expects: "latest (or true), a checkpoint's folder, or none",
			switch: true,
			description: "Resume a run at the exact sample and state of its newest or a given checkpoint.",
		},
	),
};

export const output = {
	run_name: stringOrNone({
		description: "A name for the run in its metrics.",
	}),
	logging_steps: stepsOrRatio({
		zero: false,
		default: 10,
		description: "Steps between lines of metrics.",
	}),
	logging_first_step: boolean({
		default: false,
		description: "Log the first step too.",
	}),
	disable_tqdm: boolean({
		default: false,
		description: "Plain lines on a terminal too, instead of the live line.",
	}),
	report_to: choices(["tensorboard", "mlflow", "trackio", "prometheus", "webhook"], {
		description:
			"Where metrics go in addition to metrics.jsonl: TensorBoard's event files in `output_dir`, the tracking server that MLFLOW_TRACKING_URI names, the trackio server that TRACKIO_SERVER_URL names, a page that Prometheus scrapes, messages to a webhook when the run ends, fails or its loss spikes.",
	}),
	prometheus_address: string({
		default: "127.0.0.1:9464",
		pattern: /^([\w.-]+|\[[0-9a-f:.]+\]):\d{1,5}$/i,
		expects: "HOST:PORT",
		description: "With `report_to prometheus`: where the run serves the page `/metrics`.",
	}),
	webhook_url: stringOrNone({
		secret: true,
		expects: "an http or https address",
		description:
			"With `report_to webhook`: the address that messages go to, in the shape of Slack or Discord where it is theirs. If it is not given, the environment variable `ARL_WEBHOOK_URL` is used. It is never shown.",
	}),
};

const sizeOf = (description: string) => integer({ default: 1, min: 1, max: 65536, description });

export const devices = {
	nproc_per_node: integer({
		default: 1,
		min: 1,
		max: 1024,
		description:
			"Ranks on this machine: where no launcher has started them, `arl train` does, on GPUs with the `torchrun`, else with the `mpirun` that is installed.",
	}),
	dp_size: integer({
		default: 1,
		min: 1,
		max: 65536,
		description:
			"Data-parallel ranks; by itself what `tp_size`, `cp_size` and `pp_size` leave of those that were started: all, where these are 1. A step has this many times `gradient_accumulation_steps` micro-batches.",
	}),
	zero: custom(z.union([z.literal("auto"), z.literal(0), z.literal(1), z.literal(2), z.literal(3)]).default("auto"), {
		kind: "integer",
		expects: "auto, 0, 1, 2 or 3",
		description:
			"What ranks with the same weights divide among them: 0 nothing; 1 moments and master weights; 2 also gradients; 3 also weights, frozen ones too, which are gathered layer by layer. Results are equal in bits. Auto: 2, or 3 with `dp_replicate_size`, and where 2 does not fit a rank's share of the memory and `tp_size`, `ep_size` and `pp_size` are 1.",
	}),
	ddp_timeout: integer({
		default: 600,
		min: 1,
		max: 604_800,
		description:
			"Seconds for which ranks wait for one that sends no sign of life, or for its gradients, before the run ends with its name.",
	}),
	full_determinism: boolean({
		default: false,
		description:
			"Equal bits every time: `attention` is own, no algorithm is chosen by measurement (`matmul_autotune`), and on the CPU gradients are summed micro-batch by micro-batch in the order of the step, so that one rank has the bits of several, which always sum so. It takes memory for the gradients once more.",
	}),
	dp_replicate_size: sizeOf(
		"Replicas: groups of neighbours among the data-parallel ranks, each of which has all weights. With `zero` 3, which it asks for, a pass then gathers weights within a group, for example within a machine. Gradients, moments and master weights are divided among all ranks. It divides `dp_size`.",
	),
	tp_size: sizeOf(
		"Tensor-parallel ranks: they divide the heads and the feed-forward columns of every layer, and between these the tokens of a micro-batch.",
	),
	pp_size: sizeOf("Pipeline-parallel ranks, or stages: each has a part of the layers."),
	ep_size: sizeOf(
		"Expert-parallel ranks: they divide the experts of every layer. They are among the ranks that the other sizes count: `ep_size` divides `dp_size` x `cp_size` x `tp_size`.",
	),
	cp_size: sizeOf(
		"Context-parallel ranks: they divide the tokens of a micro-batch, and its heads where attention needs all tokens.",
	),
};

export const agentrl = {
	enable_sampling: only(false, {
		why: "supervised fine-tuning draws no samples; rows come from train_file",
		description: "Sample new trajectories while training.",
	}),
	loss_calculater: only("CrossEntropy", {
		why: "other losses are not built",
		description: "The loss (spelt as in AgentRL).",
	}),
};
