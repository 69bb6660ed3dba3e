/** `arl eval`: the figures of an evaluation while training, without training. */
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { run } from "../src/cli/eval.js";
import { type EngineOptions, loadNative, type Native, type NativeEngine } from "../src/native.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { arl, flags, metricsOf, type Place, root, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const heldOut = join(root, "assets", "heldout.jsonl");

/** Options of a run of one step from random weights. */
function trainedOnce({ model, file, out }: Place) {
	const places = { model_name_or_path: model, train_file: file, output_dir: out };
	return { ...places, init_from_config: true, max_steps: 1, save_strategy: "no" };
}

describe("arl eval", () => {
	const output = capturedOutput();
	const lines = () =>
		output.stdout
			.trimEnd()
			.split("\n")
			.map((line) => JSON.parse(line) as Record<string, number | string>);

	it("has the figures of the run that trained the model, for each of several models and sources", async () => {
		const place = tinyPlace(folder, 24);
		// Saved models have the type of the first one: in a narrower one they would not be quite the trained model.
		const config = join(place.model, "config.json");
		writeFileSync(config, JSON.stringify({ ...JSON.parse(readFileSync(config, "utf8")), dtype: "float32" }));
		const options = {
			model_name_or_path: place.model,
			train_file: place.file,
			output_dir: place.out,
			init_from_config: true,
			max_steps: 4,
			learning_rate: 1e-2,
			save_strategy: "steps",
			save_steps: 2,
			eval_file: heldOut,
			eval_strategy: "steps",
			eval_steps: 2,
			bf16: false,
		};
		const trained = await arl(["train", ...flags(options)]);
		expect(trained.code, trained.stderr).toBe(0);
		const evaluated = metricsOf(place.out).filter((line) => "eval_loss" in line);
		const models = [2, 4].map((step) => join(place.out, `checkpoint-${step}`));
		const [first = "", second = ""] = models;
		const words = ["--model_name_or_path", first, "--compare", second, "--eval_file", heldOut, "--bf16", "false"];
		expect(await run([...words, "--json", "--per_device_eval_batch_size", "3"])).toBe(0);
		const found = lines();
		expect(found.map(({ type, model, rows }) => [type, model, rows])).toEqual(
			models.map((model) => ["evaluation", model, 150]),
		);
		for (const [i, line] of found.entries()) {
			for (const name of ["eval_loss", "eval_perplexity", "eval_mean_token_accuracy", "eval_entropy"]) {
				expect(line[name], `${models[i]} ${name}`).toBe(evaluated[i]?.[name]);
			}
		}
		output.stdout = "";
		expect(await run([...words.slice(0, 4), "--eval_file", `a=${heldOut}`, `b=${place.file}`, "--bf16", "false"])).toBe(
			0,
		);
		const text = output.stdout.split("\n");
		expect(text[0]).toBe(`174 rows of ${heldOut}, ${place.file}`);
		expect(text[2]).toMatch(/^ +loss +perplexity +accuracy +entropy$/);
		expect(text.filter((line) => line.startsWith("  a ") || line.startsWith("  b ")).length).toBe(4);
		expect(readdirSync(join(place.out, ".cache", "eval")).length).toBeGreaterThan(0);
	}, 120_000);

	it("opens the engine with room for the replies that it generates", async () => {
		const place = tinyPlace(folder, 4);
		const trained = await arl(["train", ...flags(trainedOnce(place))]);
		expect(trained.code, trained.stderr).toBe(0);
		const native = loadNative();
		const opened: EngineOptions[] = [];
		const calls: number[][] = [];
		const open = async (given: EngineOptions) => {
			opened.push(given);
			const engine = await native.Engine.open(given);
			const generate: NativeEngine["generate"] = (prompts, ...rest) => {
				calls.push(prompts.map(({ length }) => length));
				return engine.generate(prompts, ...rest);
			};
			return new Proxy(engine, { get: (of, key) => (key === "generate" ? generate : Reflect.get(of, key)) });
		};
		const words = ["--model_name_or_path", place.out, "--eval_file", place.file, "--eval_generate", "3", "--json"];
		const core = () => ({ ...native, Engine: { open } }) as unknown as Native;
		expect(await run([...words, "--per_device_eval_batch_size", "2"], core)).toBe(0);
		const [engine] = opened as [EngineOptions];
		expect(calls.length).toBeGreaterThan(1);
		expect(engine.evalPrompts).toEqual(calls);
		expect(engine.evalMaxNewTokens).toBeGreaterThan(8);
		const samples = lines().filter(({ type }) => type === "sample");
		expect(samples.length).toBe(calls.flat().length);
	}, 60_000);

	it("needs held-out rows", async () => {
		await expect(run(["--model_name_or_path", join(root, "assets", "model")])).rejects.toMatchObject({
			code: "ARL_USAGE",
			message: "no held-out rows are given",
		});
		const bad = run(["--model_name_or_path", join(folder, "none"), "--eval_file", heldOut]);
		await expect(bad).rejects.toMatchObject({ code: "ARL_CONFIG" });
	});
});
