/** Options of the evaluation: what they mean together, and what is refused. */
import { describe, expect, it } from "vitest";
import { refused, resolve } from "./support/config.js";

describe("options of the evaluation", () => {
	it("have the names, values and defaults of transformers", () => {
		const { args } = resolve([
			"--eval_strategy",
			"steps",
			"--eval_file",
			"a.jsonl",
			"web=b.jsonl",
			"--eval_steps",
			"0.1",
		]);
		expect(args).toMatchObject({
			eval_strategy: "steps",
			eval_file: ["a.jsonl", "web=b.jsonl"],
			eval_steps: 0.1,
			eval_delay: 0,
			eval_on_start: false,
			per_device_eval_batch_size: 8,
			load_best_model_at_end: false,
			metric_for_best_model: null,
			greater_is_better: null,
		});
		const older = resolve(["--evaluation_strategy", "epoch", "--per_gpu_eval_batch_size", "3", "--eval_file", "a"]);
		expect(older.args).toMatchObject({ eval_strategy: "epoch", per_device_eval_batch_size: 3 });
	});

	it("that need evaluations are refused without them", () => {
		for (const words of [
			["--load_best_model_at_end"],
			["--early_stopping_patience", "2"],
			["--save_strategy", "best"],
		]) {
			const error = refused(words);
			expect(error.code).toBe("ARL_CONFIG");
			expect(error.message).toContain(`${words[0]?.slice(2)} `);
			expect(error.message).toContain('eval_strategy "no" (the default)');
			expect(error.hint).toBe("Set eval_strategy to steps or epoch.");
		}
	});

	it("that have no effect are reported", () => {
		const { notices } = resolve(["--eval_file", "a.jsonl", "--eval_steps", "5", "--metric_for_best_model", "loss"]);
		expect(notices).toEqual([
			'eval_steps 5 (a flag) has no effect with eval_strategy "no" (the default)',
			'metric_for_best_model "loss" (a flag) has no effect with eval_strategy "no" (the default)',
			'eval_file ["a.jsonl"] (a flag) is evaluated only on request with eval_strategy "no" (the default)',
		]);
		const epoch = resolve(["--eval_strategy", "epoch", "--eval_steps", "5", "--early_stopping_threshold", "1"]).notices;
		expect(epoch).toEqual([
			'eval_steps 5 (a flag) has no effect with eval_strategy "epoch" (a flag)',
			"early_stopping_threshold 1 (a flag) has no effect without early_stopping_patience",
		]);
	});

	it("let the best model be loaded where every checkpoint has an evaluation", () => {
		const best = ["--load_best_model_at_end", "--eval_strategy", "steps"];
		for (const words of [
			["--eval_steps", "50", "--save_steps", "100"],
			["--eval_steps", "0.1", "--save_steps", "0.3"],
			["--logging_steps", "20", "--save_steps", "60"],
			["--eval_steps", "7", "--save_strategy", "best"],
		]) {
			expect(resolve([...best, ...words]).args.load_best_model_at_end, words.join(" ")).toBe(true);
		}
		const other = refused([...best, "--save_strategy", "epoch"]);
		expect(other.message).toContain('save_strategy "epoch" (a flag) and eval_strategy "steps" (a flag) differ');
		const odd = refused([...best, "--eval_steps", "30", "--save_steps", "100"]);
		expect(odd.message).toContain("save_steps 100 (a flag) is no multiple of eval_steps 30 (a flag)");
		expect(refused([...best, "--eval_steps", "0.1", "--save_steps", "100"]).message).toContain("no multiple");
		expect(refused([...best, "--save_steps", "55"]).message).toContain("no multiple of logging_steps 10 (the default)");
	});

	it("give each source a name of its own", () => {
		const error = refused(["--eval_file", "a/rows.jsonl", "b/rows.jsonl"]);
		expect(error.message).toContain("two entries are named rows");
		expect(error.hint).toContain("--eval_file NAME=PATH");
	});
});
