import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { defaultOf, metaOf } from "../src/config/fields.js";
import {
	type AgentTrainingConfigInput,
	configJsonSchema,
	defineConfig,
	environmentLayer,
	formatOptions,
	formatResolved,
	loadConfigFile,
	OPTION_NAMES,
	optionsMarkdown,
	parseFlags,
	resolveConfig,
	resolvedAsJson,
	trainingSchema,
} from "../src/config/index.js";
import { ArlError } from "../src/errors.js";
import { fc, holds } from "./support/properties.js";

const REQUIRED = ["--model_name_or_path", "model", "--output_dir", "out"];

function resolve(words: string[], file: AgentTrainingConfigInput | Record<string, unknown> = {}) {
	return resolveConfig([
		{ origin: "run.yaml", values: Object.entries(file) },
		{ origin: "flag", values: parseFlags([...REQUIRED, ...words]).options },
	]);
}

function refused(words: string[], file: Record<string, unknown> = {}): ArlError {
	try {
		resolve(words, file);
	} catch (error) {
		if (error instanceof ArlError) return error;
		throw error;
	}
	throw new Error(`accepted: ${words.join(" ")} ${JSON.stringify(file)}`);
}

const folder = mkdtempSync(join(tmpdir(), "arl-config-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function write(name: string, text: string | Buffer): string {
	const path = join(folder, name);
	writeFileSync(path, text);
	return path;
}

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
		// @ts-expect-error what is not built is refused by the compiler already
		defineConfig({ model_name_or_path: "m", output_dir: "o", tp_size: 8 });
		// @ts-expect-error so is a name that is unknown
		defineConfig({ model_name_or_path: "m", output_dir: "o", learning_rat: 1 } satisfies AgentTrainingConfigInput);
	});
});

describe("flags", () => {
	it("reads a switch alone, with a value, and negated", () => {
		expect(resolve(["--bf16"]).args.bf16).toBe(true);
		expect(resolve(["--bf16", "true"]).args.bf16).toBe(true);
		expect(resolve(["--bf16", "False"]).args.bf16).toBe(false);
		expect(resolve(["--no_bf16"], { bf16: true }).args.bf16).toBe(false);
		expect(resolve(["--bf16=false"]).args.bf16).toBe(false);
		expect(resolve(["--no_logging_first_step"]).args.logging_first_step).toBe(false);
	});

	it("refuses two types of 16 bits, and random rounding of another than bf16, with what to do", () => {
		expect(resolve(["--fp16"]).args).toMatchObject({ fp16: true, bf16: "auto" });
		expect(resolve(["--fp16", "--bf16", "false"]).args).toMatchObject({ fp16: true, bf16: false });
		expect(resolve(["--bf16", "--bf16_stochastic_round"]).args.bf16_stochastic_round).toBe(true);
		const both = refused(["--fp16", "--bf16"]);
		expect(both.message).toContain("fp16 true (a flag) contradicts bf16 true (a flag)");
		expect(both.hint).toContain("Give only one of them");
		for (const [words, other] of [
			[["--bf16", "false"], "bf16 false (a flag)"],
			[["--fp16"], "fp16 true (a flag)"],
		] as const) {
			const error = refused([...words, "--bf16_stochastic_round"]);
			expect(error.message).toContain(`bf16_stochastic_round true (a flag) contradicts ${other}`);
			expect(error.hint).toContain("Add --bf16");
		}
	});

	it("leaves bf16 to the device unless it is said, and takes none of other programs' files for unsaid", () => {
		expect(resolve([]).args.bf16).toBe("auto");
		expect(resolve(["--bf16", "auto"], { bf16: true }).args.bf16).toBe("auto");
		expect(resolve([], { bf16: null }).args.bf16).toBe("auto");
	});

	it("reads what is offloaded as switches, off by default", () => {
		expect(resolve([]).args).toMatchObject({ activation_offloading: false, optimizer_offload: false });
		const { args } = resolve(["--activation_offloading", "--optimizer_offload"]);
		expect(args).toMatchObject({ activation_offloading: true, optimizer_offload: true });
		expect(resolve([]).args.attention).toBe("own");
		expect(resolve(["--full_determinism"])).toMatchObject({
			args: { attention: "own" },
			notices: ['full_determinism (a flag) is read as attention "own"'],
		});
		expect(resolve(["--full_determinism", "false"], { attention: "auto" }).args.attention).toBe("auto");
		expect(resolve(["--no_activation_offloading"], { activation_offloading: true }).args.activation_offloading).toBe(
			false,
		);
	});

	it("reads recompute levels by name and as a switch", () => {
		expect(resolve([]).args.gradient_checkpointing).toBe("norms");
		expect(resolve(["--gradient_checkpointing"]).args.gradient_checkpointing).toBe("block");
		expect(resolve(["--gradient_checkpointing", "mlp"]).args.gradient_checkpointing).toBe("mlp");
		expect(resolve(["--no_gradient_checkpointing"]).args.gradient_checkpointing).toBe("off");
		expect(resolve([], { gradient_checkpointing: false }).args.gradient_checkpointing).toBe("off");
	});

	it("reads several files, weights, columns and schedule settings", () => {
		const { args } = resolve(
			"--train_file a.jsonl b.jsonl --train_file c.jsonl --train_weights 1 2 0.5 --columns prompt=q completion=1 --lr_scheduler_kwargs num_cycles=2".split(
				" ",
			),
		);
		expect(args.train_file).toEqual(["a.jsonl", "b.jsonl", "c.jsonl"]);
		expect(args.train_weights).toEqual([1, 2, 0.5]);
		expect(args.columns).toEqual({ prompt: "q", completion: "1" });
		expect(args.lr_scheduler_kwargs).toEqual({ num_cycles: 2 });
		expect(resolve(["--lr_scheduler_kwargs", '{"power": 2}']).args.lr_scheduler_kwargs).toEqual({ power: 2 });
	});

	it("reads none, a negative number and latest", () => {
		expect(resolve(["--save_total_limit", "none"], { save_total_limit: 3 }).args.save_total_limit).toBeNull();
		expect(resolve(["--max_steps", "-1"]).args.max_steps).toBe(-1);
		expect(resolve(["--resume_from_checkpoint"]).args.resume_from_checkpoint).toBe("latest");
		expect(resolve(["--resume_from_checkpoint", "true"]).args.resume_from_checkpoint).toBe("latest");
		expect(resolve(["--resume_from_checkpoint", "out/checkpoint-3"]).args.resume_from_checkpoint).toBe(
			"out/checkpoint-3",
		);
		expect(resolve(["--report_to", "none"]).args.report_to).toBe("none");
	});

	it("leaves a configuration file after a switch alone", () => {
		expect(parseFlags(["--bf16", "run.yaml"]).words).toEqual(["run.yaml"]);
	});

	it("refuses an unknown flag with the nearest name", () => {
		expect(refused(["--learning-rat", "1"]).hint).toBe("Did you mean --learning_rate?");
		expect(refused(["--bacth_size", "1"]).code).toBe("ARL_USAGE");
		expect(refused(["--zzzzzzzzzzzz"]).hint).toContain("--help");
		expect(refused(["-x"]).message).toBe("unknown option -x");
	});

	it("refuses a flag without its value", () => {
		expect(refused(["--learning_rate"]).message).toBe("--learning_rate needs a value");
		expect(refused(["--train_file", "--bf16"]).message).toBe("--train_file needs a value");
	});

	it("whatever they are, are read or refused as an error of ours", () => {
		const words =
			'--bf16 --no_bf16 --train_file --columns a=b {} {"a": --seed -1 1e999 none true = -- --= -x a=b= --lr_scheduler_kwargs --train_weights 1 --db_uri --report_to --__proto__ --no_ --resume_from_checkpoint'.split(
				" ",
			);
		let read = 0;
		const given = (chosen: string[]) => {
			try {
				resolve(chosen);
				read++;
			} catch (error) {
				expect(error).toBeInstanceOf(ArlError);
				expect((error as ArlError).exitCode).toBe(2);
			}
		};
		holds(1000, fc.property(fc.array(fc.constantFrom(...words), { minLength: 1, maxLength: 6 }), given));
		expect(read).toBeGreaterThan(15);
	});
});

describe("values that are refused", () => {
	it.each([
		["learning_rate", "1e400", "a number, 0 or more"],
		["learning_rate", "nan", "a number, 0 or more"],
		["learning_rate", "-1", "a number, 0 or more"],
		["learning_rate", "0x10", "a number, 0 or more"],
		["learning_rate", "1e-5x", "a number, 0 or more"],
		["learning_rate", "none", "a number, 0 or more"],
		["adam_beta1", "1", "a number, 0 or more and below 1"],
		["per_device_train_batch_size", "0", "a whole number, 1 or more and at most 65536"],
		["per_device_train_batch_size", "1.5", "a whole number, 1 or more and at most 65536"],
		["max_steps", "0", "a whole number of 1 or more, or -1"],
		["num_train_epochs", "0", "a number, above 0 and at most 1000000"],
		["save_steps", "1.5", "a whole number of steps, or a part of all steps (above 0 and below 1)"],
		["save_steps", "0", "a whole number of steps, or a part of all steps (above 0 and below 1)"],
		["bf16", "maybe", "true, false or auto"],
		["optimizer_offload", "maybe", "true or false"],
		["attention", "flash", "one of auto, cudnn, own"],
		["truncation", "middle", "one of error, drop, left, right"],
		["seed", "99999999999999999999", "a whole number, 0 or more and at most 4294967295"],
		["tp_size", "8", "1 (one device only"],
		["fp16", "maybe", "true or false"],
		["eval_strategy", "steps", "no (evaluation while training is not built"],
		["device", "gpu", "auto, cpu, cuda or cuda:N"],
		["report_to", "wandb", "none (other sinks are not built yet"],
		["enable_sampling", "true", "false (supervised fine-tuning draws no samples"],
		["activation_offloading", "maybe", "true or false"],
		["loss_calculater", "GRPO", "CrossEntropy (other losses are not built"],
	])("%s %s, naming the option, the value and what is expected", (name, value, expected) => {
		const error = refused([`--${name}`, value]);
		expect(error.code).toBe("ARL_CONFIG");
		expect(error.exitCode).toBe(2);
		expect(error.message).toContain(`${name}: `);
		expect(error.message).toContain(`(a flag); expected ${expected}`);
	});

	it("of the wrong type in a file", () => {
		for (const [name, value] of Object.entries({
			learning_rate: "2e-5",
			bf16: "true",
			per_device_train_batch_size: Number.POSITIVE_INFINITY,
			seed: Number.NaN,
			train_file: 3,
			columns: ["a"],
		})) {
			const error = refused([], { [name]: value });
			expect(error.message, name).toContain(`${name}: `);
			expect(error.message, name).toContain("(run.yaml)");
		}
	});

	it("all at once, a line each", () => {
		const lines = refused(["--learning_rate", "-1", "--seed", "x"], { colour: "red" }).message.split("\n");
		expect(lines).toHaveLength(3);
	});

	it("when a required option is missing", () => {
		expect(() => resolveConfig([])).toThrow(/model_name_or_path is missing.*\n.*output_dir is missing/);
	});

	it("by the nearest name in a file", () => {
		const error = refused([], { learning_rat: 1 });
		expect(error.message).toBe('unknown option "learning_rat" (run.yaml)');
		expect(error.hint).toBe("Did you mean learning_rate?");
		for (const name of ["__proto__", "constructor", "toString"]) {
			expect(refused([], JSON.parse(`{"${name}": 1}`)).message, name).toContain("unknown option");
		}
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
		expect(refused(["--lr_scheduler_type", "greedy"]).message).toContain("needs evaluation");
		expect(refused(["--lr_scheduler_type", "reduce_lr_on_plateau"]).message).toContain("needs evaluation");
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

	it("names what following a database needs, and each option that contradicts it", () => {
		expect(refused(["--follow_idle", "3"]).message).toContain("no meaning without follow");
		expect(refused(["--follow"]).message).toContain("none is given");
		const follow = ["--db_connection_string", "mongodb://host/db", "--follow"];
		expect(refused(follow).message).toMatch(
			/follow needs max_steps.*\ntrain_sampling_strategy "random" \(the default\)/,
		);
		const whole = [...follow, "--max_steps", "9", "--train_sampling_strategy", "sequential"];
		expect(resolve([...whole, "--follow_idle", "0.5"]).args.follow_idle).toBe(0.5);
		for (const contradiction of [
			["--train_file", "a"],
			["--dataset", "a.ts"],
			["--convert", "a.ts"],
			["--num_train_epochs", "2"],
			["--max_trained_count", "2"],
			["--retrained_interval", "2"],
			["--mongo_write_back", "none"],
			["--max_tokens_per_micro_batch", "99"],
			["--on_bad_row", "skip"],
			["--truncation", "drop"],
		]) {
			const shown = `${contradiction[0]?.slice(2)} `;
			expect(refused([...whole, ...contradiction]).message).toMatch(new RegExp(`^${shown}.* contradicts follow: `));
		}
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

describe("files", () => {
	it("of all kinds give the same values", async () => {
		const paths = [
			write("a.yaml", "learning_rate: 1e-5\neval_strategy: no\ntrain_file: [a.jsonl]\n"),
			write("a.json", '{"$schema": "x", "learning_rate": 1e-5, "eval_strategy": "no", "train_file": ["a.jsonl"]}'),
			write(
				"arl.config.ts",
				'import { defineConfig } from "arl";\nconst rate: number = 1e-5;\nexport default defineConfig({ learning_rate: rate, eval_strategy: "no", train_file: ["a.jsonl"] } as never);\n',
			),
			write(
				"b.mjs",
				'export default async () => ({ learning_rate: 1e-5, eval_strategy: "no", train_file: ["a.jsonl"] });\n',
			),
		];
		for (const path of paths) {
			const values = Object.fromEntries((await loadConfigFile(path)).values);
			expect(values, path).toEqual({ learning_rate: 1e-5, eval_strategy: "no", train_file: ["a.jsonl"] });
		}
	});

	it.each([
		["twice.yaml", "seed: 1\nseed: 2\n", /twice\.yaml:2:\d+: .*unique/],
		["broken.yaml", "seed: [1\n", /broken\.yaml:\d+:\d+: /],
		["list.yaml", "- a\n", /expected options by name, found a list/],
		["broken.json", '{\n"seed": 1,\n}', /broken\.json:3: not JSON/],
		["rows.jsonl", "{}", /not a configuration file by its name/],
		["throws.mjs", "throw new Error('no luck');", /throws\.mjs: no luck/],
		["latin.yaml", Buffer.from([0x61, 0x3a, 0x20, 0xe9]), /not text in UTF-8/],
	])("%s is refused with where it is wrong", async (name, text, message) => {
		await expect(loadConfigFile(write(name, text))).rejects.toThrow(message);
	});

	it("that are missing or folders are refused", async () => {
		await expect(loadConfigFile(join(folder, "none.yaml"))).rejects.toMatchObject({ code: "ARL_IO" });
		await expect(loadConfigFile(join(folder, "none.ts"))).rejects.toMatchObject({ code: "ARL_IO" });
	});

	it("that bite their own tail or bloat are refused", async () => {
		const bomb = [
			"a: &a [x, x]",
			"b: &b [*a, *a, *a, *a, *a]",
			"c: &c [*b, *b, *b, *b, *b]",
			"d: [*c, *c, *c, *c, *c]",
		];
		await expect(loadConfigFile(write("bomb.yaml", bomb.join("\n")))).rejects.toMatchObject({ code: "ARL_CONFIG" });
	});
});

describe("what is shown", () => {
	it("is every value with its origin", () => {
		const resolved = resolve(["--seed", "7"], { learning_rate: 1e-3 });
		const text = formatResolved(resolved);
		expect(text).toMatch(/^seed +7 +flag$/m);
		expect(text).toMatch(/^learning_rate +0\.001 +run\.yaml$/m);
		expect(text.trimEnd().split("\n")).toHaveLength(OPTION_NAMES.length);
		expect(resolvedAsJson(resolved).seed).toEqual({ value: 7, origin: "flag" });
	});

	it("is help for every option, within the width", () => {
		const help = formatOptions(80);
		for (const name of OPTION_NAMES) expect(help).toContain(`--${name} `);
		for (const line of help.split("\n")) expect(line.length).toBeLessThanOrEqual(80);
	});

	it("states for every option a default that the schema really has", () => {
		const { args } = resolveConfig([
			{
				origin: "code",
				values: [
					["model_name_or_path", "m"],
					["output_dir", "o"],
				],
			},
		]);
		for (const name of OPTION_NAMES) {
			const shown = defaultOf(trainingSchema.shape[name]);
			if (shown === undefined) continue;
			const value = args[name];
			const empty = value === null || (typeof value === "object" && Object.keys(value).length === 0);
			expect(empty ? "none" : String(value), name).toBe(shown);
		}
	});

	it("is docs/options.md, up to date (`npm run docs:options` writes it)", () => {
		expect(readFileSync(new URL("../docs/options.md", import.meta.url), "utf8")).toBe(optionsMarkdown());
	});

	it("is a JSON Schema that knows every option and refuses others", () => {
		const schema = configJsonSchema() as {
			properties: Record<string, { description?: string }>;
			additionalProperties: boolean;
		};
		for (const name of OPTION_NAMES) expect(schema.properties[name]?.description, name).toBeTruthy();
		expect(schema.additionalProperties).toBe(false);
		expect(schema.properties.tp_size).toMatchObject({ const: 1, default: 1 });
		expect(schema.properties.optim).toMatchObject({ enum: ["adamw_torch", "adamw_torch_fused"] });
	});
});

describe("every option", () => {
	it("that has more than one value is read by the trainer, the rows or a command", () => {
		const folders = ["run", "data", "cli", "mongo"].map((name) => new URL(`../src/${name}/`, import.meta.url));
		const sources = folders.flatMap((url) =>
			readdirSync(url, { recursive: true, encoding: "utf8" })
				.filter((name) => name.endsWith(".ts"))
				.map((name) => readFileSync(new URL(name, url), "utf8")),
		);
		const code = sources.join("\n");
		// Both names of optim are one optimizer.
		const without = new Set(["optim"]);
		for (const name of OPTION_NAMES) {
			if (metaOf(trainingSchema.shape[name]).fixed || without.has(name)) continue;
			expect(code.includes(`args.${name}`) || code.includes(`options.${name}`), name).toBe(true);
		}
	});
});
