import { describe, expect, it } from "vitest";
import { defineConfig, environmentLayer, OPTION_NAMES, resolveConfig } from "../src/config/index.js";
import { refused, resolve } from "./support/config.js";

describe("layers", () => {
	it("lets a flag win over the file and the file over the default, and says where each value comes from", () => {
		const { args, origins } = resolve(["--learning_rate", "1e-4"], { learning_rate: 1e-3, num_train_epochs: 2 });
		expect(args.learning_rate).toBe(1e-4);
		expect(args.num_train_epochs).toBe(2);
		expect(args.weight_decay).toBe(0);
		expect(origins.learning_rate).toBe("flag");
		expect(origins.num_train_epochs).toBe("run.yaml");
		expect(origins.weight_decay).toBe("default");
	});

	it("takes every flag of the original guide by its own name", () => {
		const { args } = resolve(
			"--enable_sampling false --loss_calculater CrossEntropy --eval_strategy no --max_trained_count 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 2e-5 --num_train_epochs 1 --save_steps 500 --save_total_limit 2 --bf16 --loss_seq_chunk_size 512 --activation_offloading false --tp_size 1 --pp_size 1 --ep_size 1 --train_file a.jsonl".split(
				" ",
			),
		);
		expect(args).toMatchObject({
			enable_sampling: false,
			loss_calculater: "CrossEntropy",
			eval_strategy: "no",
			gradient_accumulation_steps: 8,
			bf16: true,
			loss_seq_chunk_size: 512,
			train_file: ["a.jsonl"],
		});
	});

	it("takes TRL's flags of the reference run", () => {
		const { args, notices } = resolve(
			"--train_file rows.jsonl --per_device_train_batch_size 4 --gradient_accumulation_steps 3 --learning_rate 2e-3 --lr_scheduler_type linear --warmup_steps 4 --weight_decay 0.01 --max_grad_norm 1.0 --num_train_epochs 2 --max_length 384 --truncation right --train_sampling_strategy sequential --save_strategy no --logging_steps 1 --bf16 false --seed 3".split(
				" ",
			),
		);
		expect(args).toMatchObject({ warmup_steps: 4, max_length: 384, truncation: "right", bf16: false, seed: 3 });
		expect(notices).toEqual([]);
	});

	it("resolves the object of defineConfig with every value filled in", () => {
		const config = defineConfig({ model_name_or_path: "m", output_dir: "o", train_file: "a.jsonl", bf16: true });
		const { args } = resolveConfig([{ origin: "code", values: Object.entries(config) }]);
		expect(args.train_file).toEqual(["a.jsonl"]);
		for (const name of OPTION_NAMES) expect(args[name], name).not.toBeUndefined();
	});
});

describe("names from elsewhere", () => {
	it("translates older names with a notice", () => {
		const { args, notices } = resolve(["--warmup_ratio", "0.1", "--truncation_mode", "keep_end", "--no_cuda"]);
		expect(args.warmup_steps).toBe(0.1);
		expect(args.truncation).toBe("left");
		expect(notices).toEqual([
			"warmup_ratio (a flag) is read as warmup_steps",
			'truncation_mode (a flag) is read as truncation "left"',
			'no_cuda (a flag) is read as device "cpu"',
		]);
	});

	it("refuses a warmup_ratio that would be read as steps", () => {
		expect(refused(["--warmup_ratio", "1"]).message).toContain("warmup_ratio 1 (a flag)");
	});

	it("refuses two names of one option, but lets a flag win over an older name in the file", () => {
		expect(refused(["--warmup_ratio", "0.1", "--warmup_steps", "5"]).message).toContain("two names of one option");
		expect(resolve(["--warmup_steps", "5"], { warmup_ratio: 0.1 }).args.warmup_steps).toBe(5);
	});

	it("refuses what is known and not built by name, and takes it where its value says what happens anyway", () => {
		expect(refused(["--neftune_noise_alpha", "5"]).message).toMatch(/neftune_noise_alpha 5 .* known and not built/);
		expect(refused(["--lr_scheduler_type", "greedy"]).message).toContain("follows evaluations");
		expect(refused(["--lr_scheduler_type", "reduce_lr_on_plateau"]).message).toContain("follows evaluations");
		expect(refused(["--group_by_length"]).message).toContain("group_by_length");
		expect(refused(["--optim", "adafactor"]).message).toContain("one of adamw_torch, adamw_torch_fused");
		expect(refused([], { deepspeed: { stage: 3 } }).message).toContain("deepspeed");
		expect(() => resolve(["--neftune_noise_alpha", "none", "--label_smoothing_factor", "0"])).not.toThrow();
		expect(() => resolve(["--push_to_hub", "false"], { ddp_timeout: 1800, fsdp: "" })).not.toThrow();
	});

	it("never shows a secret", () => {
		const secret = "mongodb://user:hunter2@host:27017";
		for (const error of [
			refused(["--db_connection_string", secret, "--seed", "x"]),
			refused(["--db_conection_string", secret]),
			refused(["--hub_token", "hunter2"]),
			refused([], { db_connection_string: { secret }, my_api_key: "hunter2" }),
			refused(["--device", secret]),
			refused(["--truncation", secret]),
		]) {
			expect(`${error.message} ${error.hint}`).not.toContain("hunter2");
		}
	});
});

describe("options together", () => {
	it("refuses contradictions and names both sides", () => {
		const packing = refused(["--max_tokens_per_micro_batch", "4096"], { per_device_train_batch_size: 2 });
		expect(packing.message).toContain("per_device_train_batch_size 2 (run.yaml)");
		expect(packing.message).toContain("max_tokens_per_micro_batch 4096 (a flag)");
		expect(refused(["--max_tokens_per_micro_batch", "64", "--max_length", "65"]).message).toContain("max_length 65");
		expect(refused(["--train_file", "a", "b", "--train_weights", "1"]).message).toContain("train_weights has 1");
		expect(refused(["--overwrite_output_dir", "--resume_from_checkpoint", "latest"]).message).toContain("contradicts");
	});

	it("names what following a database needs", () => {
		expect(refused(["--follow_idle", "3"]).message).toContain("no meaning without follow");
		expect(refused(["--follow"]).message).toContain("none is given");
		const follow = ["--db_connection_string", "mongodb://host/db", "--follow"];
		expect(refused(follow).message).toMatch(
			/follow needs max_steps.*\ntrain_sampling_strategy "random" \(the default\)/,
		);
		const whole = [...follow, "--max_steps", "9", "--train_sampling_strategy", "sequential"];
		expect(resolve([...whole, "--follow_idle", "0.5"]).args.follow_idle).toBe(0.5);
	});

	it("knows which options need a database", () => {
		expect(refused(["--db_source", "Record"]).message).toContain("db_connection_string is not given");
		expect(refused(["--db_match", '{"a": {"$gt": 1}}']).message).toContain("db_connection_string is not given");
		const address = ["--db_connection_string", "mongodb://host/db"];
		expect(refused([...address, "--train_file", "a", "--train_weights", "1"]).message).toContain(
			"db_connection_string",
		);
		const { args } = resolve([
			...address,
			"--db_match",
			'{"a": {"$gt": 1}}',
			"--mongo_write_back",
			"none",
			"--split",
			"none",
		]);
		expect(args).toMatchObject({ db_match: { a: { $gt: 1 } }, mongo_write_back: "none", split: null });
		expect(resolve(["--db_uri", "mongodb://host/db"]).args.db_connection_string).toBe("mongodb://host/db");
	});

	it("takes the connection string from the environment where no other rows are given", () => {
		const env = { ARL_DB_CONNECTION_STRING: "mongodb://host/db" };
		const layer = (values: [string, unknown][]) => environmentLayer([{ origin: "flag", values }], env);
		expect(layer([])).toEqual([
			{ origin: "ARL_DB_CONNECTION_STRING", values: [["db_connection_string", "mongodb://host/db"]] },
		]);
		expect(layer([["train_file", ["a"]]])).toEqual([]);
		expect(
			layer([
				["train_file", ["a"]],
				["db_source", "Record"],
			]),
		).toHaveLength(1);
		expect(environmentLayer([], {})).toEqual([]);
	});

	it("takes packing alone, since the default number of samples is not a wish", () => {
		expect(resolve(["--max_tokens_per_micro_batch", "4096"]).args.max_tokens_per_micro_batch).toBe(4096);
	});

	it("says what has no effect", () => {
		const { notices } = resolve("--max_steps 5 --num_train_epochs 2 --save_strategy no --save_steps 3".split(" "));
		expect(notices).toEqual([
			"num_train_epochs 2 (a flag) has no effect: max_steps 5 (a flag) is set",
			'save_steps 3 (a flag) has no effect with save_strategy "no" (a flag)',
		]);
	});
});
