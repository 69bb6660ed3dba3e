import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { createTrainer } from "../src/api/trainer.js";
import { preprocessSeconds, resolveArgs } from "../src/run/setup/options.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { metricsOf } from "./support/real.js";
import { chatRow, events, numbers, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
describe("a run", () => {
	it("reports what happens in order, and leaves the model and its metrics in output_dir", async () => {
		const place = workspace(folder);
		const all = await events(trainer(place));
		const types = all.map(({ type }) => type);
		expect(types.indexOf("check")).toBeLessThan(types.indexOf("fill"));
		expect(types.indexOf("fill")).toBeLessThan(types.indexOf("start"));
		// 22 rows are 11 micro-batches: 4 steps an epoch, the last of 2.
		expect(ofType(all, "step").map(({ step, epoch }) => [step, epoch])).toEqual([
			[1, 3 / 11],
			[2, 6 / 11],
			[3, 9 / 11],
			[4, 1],
			[5, 1 + 3 / 11],
			[6, 1 + 6 / 11],
			[7, 1 + 9 / 11],
			[8, 2],
		]);
		expect(ofType(all, "epoch").map(({ epoch, step }) => [epoch, step])).toEqual([
			[1, 4],
			[2, 8],
		]);
		expect(ofType(all, "start")[0]).toMatchObject({ totalSteps: 8, stepsPerEpoch: 4, firstStep: 0 });
		expect(all.at(-1)).toMatchObject({ type: "end", outcome: "completed", steps: 8, modelPath: place.out });
		expect(existsSync(join(place.out, "model.safetensors"))).toBe(true);
		expect(existsSync(join(place.out, "config.json"))).toBe(true);
		expect(metricsOf(place.out)).toEqual(ofType(all, "log").map(({ metrics }) => metrics));
	});

	it("logs the names of TRL first, with the mean over micro-batches and the rate that the step used", async () => {
		const place = workspace(folder);
		const all = await events(trainer(place, { logging_steps: 3, learning_rate: 0.1, warmup_steps: 2 }));
		const logs = metricsOf(place.out);
		expect(logs.map(({ step }) => step)).toEqual([3, 6, 8]);
		expect(Object.keys(logs[0] ?? {})).toEqual(
			expect.arrayContaining([
				"step",
				"epoch",
				"loss",
				"grad_norm",
				"learning_rate",
				"mean_token_accuracy",
				"num_tokens",
				"entropy",
			]),
		);
		const steps = ofType(all, "step");
		expect(steps.map(({ learningRate }) => learningRate).slice(0, 3)).toEqual([0, 0.05, 0.1]);
		const mean = (steps[0]?.loss ?? 0) / 3 + (steps[1]?.loss ?? 0) / 3 + (steps[2]?.loss ?? 0) / 3;
		expect(logs[0]?.loss).toBeCloseTo(mean, 12);
		expect(logs[0]?.grad_norm).toBe(steps[2]?.gradNorm);
		expect(logs.at(-1)?.num_tokens).toBe(steps.reduce((sum, { tokens }) => sum + tokens, 0));
	});

	it("gives the same numbers for the same seed, and others for another", async () => {
		const place = workspace(folder);
		const run = async (seed: number) =>
			numbers(await events(trainer(place, { seed, output_dir: `${place.out}-${Math.random()}` })));
		const first = await run(1);
		expect(await run(1)).toEqual(first);
		expect(await run(2)).not.toEqual(first);
	});

	it("needs no preparation of all rows: the first step comes before the cache is complete", async () => {
		const place = workspace(folder, 3000);
		let filledAtFirstStep = -1;
		const native = fakeNative({ fillMs: 30 });
		const open = native.TokenCache.open;
		let filled = () => 0;
		native.TokenCache.open = (...args) => {
			const cache = open(...args);
			filled = () => cache.filled();
			return cache;
		};
		const run = trainer(place, { preprocess_seconds: 0, max_steps: 100, num_train_epochs: 1 }, native);
		for await (const event of run.run()) {
			if (event.type === "step" && event.step === 1) filledAtFirstStep = filled();
		}
		expect(filledAtFirstStep).toBeGreaterThan(0);
		expect(filledAtFirstStep).toBeLessThan(3000);
	});

	it("checks the rows of files for 20 s at most before the first step, those of a database alone hardly, and any as long as is asked", () => {
		const [file, database] = [{ train_file: ["rows.jsonl"] }, { db_connection_string: "mongodb://localhost/db" }];
		const seconds = (more: object, hasDataset = false) =>
			preprocessSeconds(resolveArgs({ model_name_or_path: "m", output_dir: "o", ...more }).args, hasDataset);
		expect(seconds(file)).toBe(20);
		expect(seconds(database)).toBe(0.2);
		expect(seconds({ ...file, ...database })).toBe(20);
		expect(seconds(database, true)).toBe(20);
		expect(seconds({ ...database, preprocess_seconds: 7 })).toBe(7);
	});

	it("gives the same numbers whether rows were ready before or came while it ran", async () => {
		const place = workspace(folder, 1500);
		const run = async (name: string, preprocess: number, fillMs: number) => {
			const options = { preprocess_seconds: preprocess, output_dir: `${place.out}-${name}`, num_train_epochs: 1 };
			return numbers(await events(trainer(place, options, fakeNative({ fillMs }))));
		};
		expect(await run("late", 0, 20)).toEqual(await run("early", 60, 0));
	});

	it("packs, with every row of an epoch trained once", async () => {
		const place = workspace(folder, 40);
		const seen: number[] = [];
		const native = fakeNative({
			onStep: (_, batches) => {
				for (const { inputIds, cuSeqlens } of batches) {
					expect(inputIds.length).toBeLessThanOrEqual(100);
					seen.push(cuSeqlens.length - 1);
				}
				return undefined;
			},
		});
		await events(trainer(place, { max_tokens_per_micro_batch: 100, num_train_epochs: 3 }, native));
		expect(seen.reduce((a, b) => a + b, 0)).toBe(120);
	});

	it("trains rows from code", async () => {
		const place = workspace(folder);
		const rows = Array.from({ length: 6 }, (_, i) => JSON.parse(chatRow(`row ${i}`)));
		const args = { ...trainer(place).args, train_file: [] };
		const result = await createTrainer({ args, train_dataset: rows }, () => fakeNative()).train();
		expect(result).toMatchObject({ outcome: "completed", steps: 2 });
		const none = await errorOf(
			createTrainer({ args: { ...args, output_dir: `${place.out}2` } }, () => fakeNative()).train(),
		);
		expect(none.message).toContain("train_file is missing");
	});
});

describe("bad rows", () => {
	const bad = [chatRow("good"), "{", chatRow("fine"), '{"messages": 1}', chatRow("good too")].join("\n");

	it("stop the run before training with file and line, and nothing is written", async () => {
		const place = workspace(folder);
		writeFileSync(place.file, bad);
		const error = await errorOf(trainer(place).train());
		expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		expect(error.message).toContain("2 of 5 rows cannot be used (1 no messages, 1 not json)");
		expect(error.message).toContain(`${place.file}:2: not json`);
		expect(error.hint).toContain("--on_bad_row skip");
		expect(existsSync(place.out)).toBe(false);
	});

	it("are left out with on_bad_row skip, and every one of them is reported", async () => {
		const place = workspace(folder);
		writeFileSync(place.file, bad);
		const all = await events(trainer(place, { on_bad_row: "skip", num_train_epochs: 1 }));
		expect(ofType(all, "rows_skipped")).toEqual([
			{
				type: "rows_skipped",
				reasons: { "no messages": 1, "not json": 1 },
				rows: [
					{ location: `${place.file}:2`, reason: "not json", message: "the row is not json" },
					{ location: `${place.file}:4`, reason: "no messages", message: "the row is no messages" },
				],
			},
		]);
		expect(ofType(all, "start")[0]?.data).toMatchObject({ rows: 5, rowsPerEpoch: 3 });
	});

	it("found while it trains end it without a new checkpoint", async () => {
		const place = workspace(folder, 2000);
		writeFileSync(place.file, `${Array.from({ length: 2000 }, (_, i) => chatRow(`row ${i}`)).join("\n")}\n{\n`);
		const native = fakeNative({ fillMs: 20 });
		const options = {
			preprocess_seconds: 0,
			train_sampling_strategy: "sequential" as const,
			save_strategy: "epoch" as const,
		};
		const error = await errorOf(trainer(place, options, native).train());
		expect(error.message).toBe(`${place.file}:2001: not json: the row is not json`);
		expect(readdirSync(place.out).filter((name) => name.startsWith("checkpoint"))).toEqual([]);
	});

	it("of an unknown shape are reported with the first row's place", async () => {
		const place = workspace(folder);
		writeFileSync(place.file, '{"foo": 1}\n');
		const error = await errorOf(trainer(place).train());
		expect(error.message).toContain(`${place.file}:1: the rows have no shape that is known`);
	});

	it("that are too long can be dropped, cut, or stop the run", async () => {
		const place = workspace(folder);
		writeFileSync(place.file, [chatRow("x".repeat(50)), chatRow("y"), chatRow("z")].join("\n"));
		const stopped = await errorOf(trainer(place, { max_length: 20 }).train());
		expect(stopped.message).toContain(`${place.file}:1: too long`);
		const start = async (truncation: "drop" | "right") =>
			ofType(
				await events(trainer(place, { max_length: 20, truncation, output_dir: `${place.out}-${truncation}` })),
				"start",
			)[0]?.data.rowsPerEpoch;
		expect(await start("drop")).toBe(2);
		expect(await start("right")).toBe(3);
	});

	it("that fit no packed micro-batch are named", async () => {
		const place = workspace(folder);
		writeFileSync(place.file, [chatRow("y"), chatRow("x".repeat(50))].join("\n"));
		const error = await errorOf(trainer(place, { max_tokens_per_micro_batch: 30 }).train());
		expect(error).toMatchObject({ code: "ARL_DATA" });
		expect(error.message).toMatch(/rows\.jsonl:2: the sample has 53 tokens, and max_tokens_per_micro_batch is 30/);
	});
});

describe("a loss or gradient that is not finite", () => {
	it("stops the run, keeps the batch and the last checkpoint", async () => {
		const place = workspace(folder);
		const native = fakeNative({ onStep: (step) => (step === 3 ? Number.NaN : undefined) });
		const options = { save_strategy: "steps" as const, save_steps: 2, train_sampling_strategy: "sequential" as const };
		const error = await errorOf(trainer(place, options, native).train());
		expect(error).toMatchObject({ code: "ARL_NONFINITE", exitCode: 5 });
		expect(error.message).toContain("step 3: the loss is NaN");
		expect(error.hint).toContain("nonfinite-step-3.json");
		expect(error.hint).toContain("checkpoint-2");
		const kept = JSON.parse(readFileSync(join(place.out, "nonfinite-step-3.json"), "utf8"));
		expect(kept.micro_batches).toHaveLength(3);
		expect(kept.micro_batches[0][0].location).toBe(`${place.file}:13`);
		expect(kept.micro_batches[0][0].input_ids.length).toBeGreaterThan(3);
	});
});
