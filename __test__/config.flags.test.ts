import { describe, expect, it } from "vitest";
import {
	checkFlags,
	flag,
	orNone,
	parseFlags,
	required,
	resolveConfig,
	stringOrNone,
	trainingSchema,
} from "../src/config/index.js";
import { ArlError } from "../src/errors.js";
import { refused, resolve } from "./support/config.js";
import { errorOf } from "./support/folder.js";
import { fc, holds } from "./support/properties.js";

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
		expect(resolve([]).args.matmul_autotune).toBe(true);
		expect(resolve(["--full_determinism"]).args).toMatchObject({ attention: "own", full_determinism: true });
		expect(resolve(["--full_determinism", "false"], { attention: "auto" }).args.attention).toBe("auto");
		expect(() => resolve(["--full_determinism"], { attention: "auto" })).toThrow(
			/full_determinism true \(a flag\) contradicts attention "auto"/,
		);
		expect(() => resolve(["--full_determinism", "--matmul_autotune"])).toThrow(
			/full_determinism true \(a flag\) contradicts matmul_autotune true/,
		);
		expect(resolve(["--no_activation_offloading"], { activation_offloading: true }).args.activation_offloading).toBe(
			false,
		);
	});

	it("takes logits of 16 bits with activations of 16 bits alone", () => {
		expect(resolve([]).args.logits_16bit).toBe(false);
		expect(resolve(["--logits_16bit"]).args).toMatchObject({ logits_16bit: true, bf16: "auto" });
		expect(resolve(["--logits_16bit", "--fp16"]).args.logits_16bit).toBe(true);
		expect(() => resolve(["--logits_16bit", "--bf16", "false"])).toThrow("logits_16bit true (a flag) contradicts bf16");
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
		expect(resolve(["--report_to", "none"]).args.report_to).toEqual([]);
		expect(resolve(["--report_to", "tensorboard", "mlflow"]).args.report_to).toEqual(["tensorboard", "mlflow"]);
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

describe("flags of a command", () => {
	const { seed, train_file, columns, bf16 } = trainingSchema.shape;
	const set = {
		name: "arl example",
		flags: {
			json: flag("Print JSON."),
			files: required(train_file, "Files."),
			most: orNone(trainingSchema.shape.max_trained_count, "Most."),
			word: stringOrNone({ description: "A word.", literal: true }),
			seed,
			columns,
			bf16,
		},
	};
	const read = (...words: string[]) => checkFlags(set, parseFlags(words, set).own);
	const wrong = (...words: string[]) => errorOf(() => read(...words));

	it("are options: shared ones are read as in a run, with their defaults", () => {
		expect(read("--files", "a", "b", "--columns", "prompt=1", "--no_bf16", "--seed=7")).toEqual({
			json: false,
			files: ["a", "b"],
			most: null,
			word: null,
			seed: 7,
			columns: { prompt: "1" },
			bf16: false,
		});
		expect(read("--files=a", "--json", "--most", "3", "--word", "none")).toMatchObject({
			json: true,
			most: 3,
			word: "none",
		});
	});

	it("end at --, and leave the words that belong to none", () => {
		expect(parseFlags(["a", "--json", "b", "--files", "c", "--", "--seed", "d"], set)).toMatchObject({
			words: ["a", "b", "--seed", "d"],
			help: false,
		});
		expect(parseFlags(["-h"], set).help).toBe(true);
	});

	it("are refused all at once, each with its value and what is expected", async () => {
		const error = await wrong("--seed", "-1", "--most", "0", "--bf16", "maybe");
		expect(error.code).toBe("ARL_USAGE");
		expect(error.message.split("\n")).toEqual([
			"--files is missing: expected files, folders or globs",
			"--most: 0; expected a whole number, 1 or more; or none",
			"--seed: -1; expected a whole number, 0 or more and at most 4294967295",
			'--bf16: "maybe"; expected true, false or auto',
		]);
		expect(error.hint).toBe("`arl example --help` lists every option.");
	});

	it("are suggested by the nearest name, and those of a run are none of them", async () => {
		expect((await wrong("--sed", "1")).hint).toBe("Did you mean --seed?");
		expect((await wrong("--no-bf16")).hint).toBe("Did you mean --no_bf16?");
		expect((await wrong("--hlep")).hint).toBe("Did you mean --help?");
		for (const name of ["--learning_rate", "--db_uri", "--tf32", "--no_json"]) {
			expect((await wrong(name, "1")).message).toBe(`unknown option ${name}`);
		}
		expect((await wrong("--json=1")).message).toBe("--json takes no value");
		expect((await wrong("--files")).message).toBe("--files needs a value");
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
		["tp_size", "0", "a whole number, 1 or more and at most 65536"],
		["fp16", "maybe", "true or false"],
		["eval_strategy", "sometimes", "one of no, steps, epoch"],
		["device", "gpu", "auto, cpu, cuda or cuda:N"],
		["report_to", "tensorboards", "one or several of tensorboard, mlflow"],
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
