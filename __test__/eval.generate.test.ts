/** `eval_generate`: replies of held-out rows at each evaluation, on the real core. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { createTrainer } from "../src/api/trainer.js";
import { type EvalReply, evaluate, QwenTrainer } from "../src/index.js";
import { type EngineOptions, loadNative, type Native, type NativeEngine } from "../src/native.js";
import { isSameReply } from "../src/run/eval/same-reply.js";
import { advise } from "../src/run/setup/memory.js";
import { refused } from "./support/config.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, differingFiles, flags, metricsOf, type Place, root, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

/** A tiny model in f32, and six held-out rows. */
function place(): Place & { heldOut: string } {
	const found = tinyPlace(folder, 24);
	const config = join(found.model, "config.json");
	writeFileSync(config, JSON.stringify({ ...JSON.parse(readFileSync(config, "utf8")), dtype: "float32" }));
	const heldOut = `${found.file}.held-out`;
	const lines = readFileSync(join(root, "assets", "heldout.jsonl"), "utf8")
		.split("\n")
		.slice(0, 6);
	writeFileSync(heldOut, `${lines.join("\n")}\n`);
	return { ...found, heldOut };
}

const options = (at: ReturnType<typeof place>) => ({
	model_name_or_path: at.model,
	train_file: at.file,
	output_dir: at.out,
	init_from_config: true,
	max_steps: 4,
	learning_rate: 1e-2,
	save_strategy: "steps" as const,
	save_steps: 4,
	eval_file: at.heldOut,
	eval_strategy: "steps" as const,
	eval_steps: 2,
	bf16: false,
});

describe("a reply is right", () => {
	const call = (args: string) => `<tool_call>\n{"name": "f", "arguments": ${args}}\n</tool_call>`;

	it("if its text is the same, exactly", () => {
		expect(isSameReply("Yes.", "Yes.")).toBe(true);
		for (const other of ["yes.", "Yes", "Yes. ", " Yes.", ""]) expect(isSameReply(other, "Yes."), other).toBe(false);
	});

	it("if its tool calls are the same JSON, in the same order, and the rest is the same text", () => {
		expect(isSameReply(call('{"a":1,"b":[2, 3]}'), call('{ "b": [2,3], "a": 1 }'))).toBe(true);
		expect(isSameReply(call('{"a":1}'), call('{"a":2}'))).toBe(false);
		expect(isSameReply(call('{"a":[1,2]}'), call('{"a":[2,1]}'))).toBe(false);
		expect(isSameReply(call('{"a":1}'), call('{"a":1,"b":null}'))).toBe(false);
		expect(isSameReply(call('{"a":1}').replace('"f"', '"g"'), call('{"a":1}'))).toBe(false);
		expect(isSameReply(`Look:\n${call('{"a": 1}')}`, `Look:\n${call('{"a":1}')}`)).toBe(true);
		expect(isSameReply(`See:\n${call('{"a": 1}')}`, `Look:\n${call('{"a":1}')}`)).toBe(false);
		const [one, two] = [call('{"a":1}'), call('{"b":1}')];
		expect(isSameReply(`${one}\n${two}`, `${two}\n${one}`)).toBe(false);
		expect(isSameReply(one, `${one}\n${two}`)).toBe(false);
		expect(isSameReply(call('{"a":1'), call('{"a":1}'))).toBe(false);
	});
});

describe("eval_generate", () => {
	it("writes the replies that arl generate gives for the saved model, and changes nothing of the training", async () => {
		const [at, plain] = [place(), place()];
		const run = await arl(["train", ...flags({ ...options(at), eval_generate: 100 })]);
		expect(run.code, run.stderr).toBe(0);
		const lines = metricsOf(at.out) as unknown as Record<string, unknown>[];
		const samples = lines.filter(({ event }) => event === "sample");
		expect([...new Set(samples.map(({ step }) => step))]).toEqual([2, 4]);
		for (const step of [2, 4]) {
			const of = samples.filter((line) => line.step === step);
			const share = of.filter(({ right }) => right).length / of.length;
			expect(lines.find((line) => line.step === step && "eval_loss" in line)?.eval_exact_match).toBe(share);
		}
		const model = join(at.out, "checkpoint-4");
		const words = ["--model_name_or_path", model, "--prompt_file", at.heldOut, "--bf16", "false", "--json"];
		const generated = await arl(["generate", ...words]);
		expect(generated.code, generated.stderr).toBe(0);
		const answers = generated.stdout
			.trimEnd()
			.split("\n")
			.map((line) => JSON.parse(line))
			.filter(({ type }) => type === "answer");
		const last = samples.filter(({ step }) => step === 4);
		expect(last.map(({ location, message, expected, reply }) => [location, message, expected, reply])).toEqual(
			answers.map(({ location, message, expected, answer }) => [location, message, expected, answer]),
		);
		expect(last.length).toBeGreaterThanOrEqual(6);
		expect(last.every(({ prompt }) => typeof prompt === "string" && prompt !== "")).toBe(true);
		const without = await arl(["train", ...flags(options(plain))]);
		expect(without.code, without.stderr).toBe(0);
		expect(differingFiles(join(plain.out, "checkpoint-4"), model)).toEqual([]);
		const again = await evaluate({
			model_name_or_path: model,
			eval_file: at.heldOut,
			eval_generate: 100,
			bf16: false,
		});
		expect(again.samples.map(({ reply }) => reply)).toEqual(last.map(({ reply }) => reply));
	}, 120_000);

	it("finds the replies right that the model has learnt, and wrong before", async () => {
		const one = join(folder, "one.jsonl");
		writeFileSync(one, `${readFileSync(join(root, "assets", "train.jsonl"), "utf8").split("\n")[0]}\n`);
		const trainer = new QwenTrainer({
			args: {
				model_name_or_path: join(root, "assets", "model"),
				train_file: one,
				output_dir: join(folder, "learnt"),
				max_steps: 80,
				learning_rate: 5e-3,
				eval_file: one,
				eval_strategy: "steps",
				eval_steps: 80,
				eval_on_start: true,
				eval_generate: 1,
				save_strategy: "no",
				bf16: false,
			},
		});
		const shares: (number | undefined)[] = [];
		for await (const event of trainer.run()) if (event.type === "evaluate") shares.push(event.metrics.eval_exact_match);
		expect(shares).toEqual([0, 1]);
	}, 120_000);

	it("takes rows spread evenly, and reports the means of a function's figures, which can decide the best", async () => {
		const at = place();
		const seen: { row: unknown; reply: EvalReply }[] = [];
		const trainer = new QwenTrainer({
			args: { ...options(at), eval_generate: 2, metric_for_best_model: "length", greater_is_better: true },
			eval_metric: (row, reply) => {
				seen.push({ row, reply });
				return { length: reply.text.length, ended: Number(reply.ended) };
			},
		});
		const metrics: Record<string, number | undefined>[] = [];
		const texts: string[][] = [];
		const locations = new Set<string>();
		for await (const event of trainer.run()) {
			if (event.type === "evaluate") {
				metrics.push({ ...event.metrics });
				texts.push([]);
			}
			if (event.type === "sample") {
				texts.at(-1)?.push(event.sample.reply);
				locations.add(event.sample.location);
			}
		}
		// The middles of the two halves of six rows.
		expect([...locations]).toEqual([`${at.heldOut}:2`, `${at.heldOut}:5`]);
		for (const [i, { eval_length }] of metrics.entries()) {
			const lengths = texts[i]?.map((text) => text.length) ?? [];
			expect(eval_length).toBe(lengths.reduce((sum, length) => sum + length, 0) / lengths.length);
		}
		expect(seen[0]?.row).toEqual(JSON.parse(readFileSync(at.heldOut, "utf8").split("\n")[1] ?? ""));
		expect(seen[0]?.reply.message.role).toBe("assistant");
	}, 120_000);

	it("and the loss, asked for by code after each step, leave every bit of the training", async () => {
		const [at, plain] = [place(), place()];
		const of = (where: typeof at) => ({
			...options(where),
			eval_strategy: "no" as const,
			eval_generate: 2,
			max_steps: 6,
		});
		const asked: number[] = [];
		const trainer = new QwenTrainer({
			args: of(at),
			callbacks: [
				{
					onStep: (_, control) => control.evaluate(),
					onEvaluate: ({ metrics }) => void asked.push(metrics.step),
				},
			],
		});
		await trainer.train();
		expect(asked).toEqual([1, 2, 3, 4, 5, 6]);
		await new QwenTrainer({ args: of(plain) }).train();
		for (const name of ["checkpoint-4", "checkpoint-6"])
			expect(differingFiles(join(plain.out, name), join(at.out, name)), name).toEqual([]);
	}, 120_000);

	it("takes the function from a module, and refuses what is none or returns no numbers", async () => {
		const at = place();
		const path = join(folder, "metric.ts");
		writeFileSync(path, "export default (row: { messages: unknown[] }, reply: { index: number }) => reply.index;\n");
		const run = await arl(["train", ...flags({ ...options(at), eval_generate: 1, eval_metric: path, max_steps: 2 })]);
		expect(run.code, run.stderr).toBe(0);
		const [line] = metricsOf(at.out).filter((found) => "eval_loss" in found);
		expect(line?.eval_metric).toBeGreaterThan(0);
		expect(refused(["--eval_metric", path]).message).toContain("is a metric of generated replies");
		const wrong = new QwenTrainer({
			args: { ...options(place()), eval_generate: 1 },
			eval_metric: (() => "good") as never,
		});
		expect(await errorOf(() => wrong.train())).toMatchObject({
			code: "ARL_USER",
			message: 'eval_metric returned "good"',
		});
		const throwing = new QwenTrainer({
			args: { ...options(place()), eval_generate: 1 },
			eval_metric: () => {
				throw new Error("no");
			},
		});
		expect(await errorOf(() => throwing.train())).toMatchObject({ code: "ARL_USER", message: "eval_metric threw: no" });
		const unknown = new QwenTrainer({
			args: { ...options(place()), eval_generate: 1, metric_for_best_model: "f1" },
			eval_metric: () => 1,
		});
		const error = await errorOf(() => unknown.train());
		expect(error).toMatchObject({ code: "ARL_CONFIG" });
		expect(error.hint).toContain("eval_exact_match, eval_metric");
	}, 120_000);
});

describe("the memory of eval_generate", () => {
	it("is planned before the run, for the calls that each evaluation makes", async () => {
		const at = place();
		const native = loadNative();
		const opened: EngineOptions[] = [];
		const calls: number[][] = [];
		const bounds = new Set<number>();
		const open = async (given: EngineOptions) => {
			opened.push(given);
			const engine = await native.Engine.open(given);
			const generate: NativeEngine["generate"] = (prompts, wanted, ...rest) => {
				calls.push(prompts.map(({ length }) => length));
				bounds.add(wanted.maxNewTokens);
				return engine.generate(prompts, wanted, ...rest);
			};
			return new Proxy(engine, { get: (of, key) => (key === "generate" ? generate : Reflect.get(of, key)) });
		};
		const args = { ...options(at), eval_generate: 5, per_device_eval_batch_size: 2 };
		const trainer = createTrainer({ args }, () => ({ ...native, Engine: { open } }) as unknown as Native);
		let total = 0;
		for await (const event of trainer.run()) if (event.type === "start") total = event.memory.totalBytes;
		const [engine] = opened as [EngineOptions];
		expect(engine.evalPrompts?.length).toBeGreaterThan(2);
		expect(calls).toEqual([...(engine.evalPrompts ?? []), ...(engine.evalPrompts ?? [])]);
		expect([...bounds]).toEqual([engine.evalMaxNewTokens]);
		expect(total).toBe(native.planMemory(engine).totalBytes);
	});

	it("falls with fewer prompts at a time by what the advice says", () => {
		const native = loadNative();
		const prompts = (...sizes: number[]) => sizes.map((size) => Array<number>(size).fill(1000));
		const base: EngineOptions = {
			modelDir: join(root, "assets", "model"),
			device: "cuda",
			dtype: "bf16",
			recompute: "block",
			maxTokens: 8,
			maxSequences: 1,
			evalMaxTokens: 8,
			evalMaxSequences: 8,
			evalPrompts: prompts(8, 2),
			evalMaxNewTokens: 100,
			adamBeta1: 0.9,
			adamBeta2: 0.999,
			adamEpsilon: 1e-8,
			weightDecay: 0,
		};
		const { evalPrompts: _, ...without } = base;
		const now = native.planMemory(base);
		expect(now.categories.map(({ name }) => name)).toContain("key-value cache");
		expect(now.totalBytes).toBeGreaterThan(native.planMemory(without).totalBytes);
		const fewer = { evalMaxTokens: 4, evalMaxSequences: 4, evalPrompts: prompts(4, 4, 2) };
		const { changes } = advise(base, native.planMemory, { packed: false, resumed: false });
		const change = changes.find(({ flags: words }) => words === "--per_device_eval_batch_size 4");
		expect(change?.plan).toEqual(native.planMemory({ ...base, ...fewer }));
		expect(change?.savedBytes).toBeGreaterThan(0);
	});
});
