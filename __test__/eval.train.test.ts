/** Evaluation while training, on the fake core: when it happens, what it reports, and what it leaves alone. */
import { existsSync, mkdirSync, readdirSync, readFileSync, readlinkSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { describe, expect, it } from "vitest";
import { createTrainer, type QwenTrainerOptions } from "../src/api/trainer.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { metricsOf } from "./support/real.js";
import { chatRow, events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();

/** A workspace with `held-out.jsonl`. */
function place(rows = 9) {
	const found = workspace(folder);
	const heldOut = join(dirname(found.file), "held-out.jsonl");
	writeFileSync(
		heldOut,
		`${Array.from({ length: rows }, (_, i) => chatRow(`held ${i} ${"y".repeat((i * 5) % 11)}`)).join("\n")}\n`,
	);
	return { ...found, heldOut };
}

const evaluating = (heldOut: string, options: Options = {}): Options => ({
	eval_file: heldOut,
	eval_strategy: "steps",
	eval_steps: 3,
	...options,
});

/** The steps after which a run of 8 steps, 4 an epoch, evaluates. */
async function evaluatedSteps(options: Options): Promise<number[]> {
	const at = place();
	const all = await events(trainer(at, { eval_file: at.heldOut, ...options }));
	return ofType(all, "evaluate").map(({ metrics }) => metrics.step);
}

describe("an evaluation", () => {
	it("comes every eval_steps, after each epoch, after the delay, and before the first step", async () => {
		expect(await evaluatedSteps({ eval_strategy: "steps", eval_steps: 3 })).toEqual([3, 6]);
		expect(await evaluatedSteps({ eval_strategy: "steps", logging_steps: 2 })).toEqual([2, 4, 6, 8]);
		expect(await evaluatedSteps({ eval_strategy: "steps", eval_steps: 0.5 })).toEqual([4, 8]);
		expect(await evaluatedSteps({ eval_strategy: "epoch" })).toEqual([4, 8]);
		expect(await evaluatedSteps({ eval_strategy: "epoch", eval_delay: 1.5 })).toEqual([8]);
		expect(await evaluatedSteps({ eval_strategy: "steps", eval_steps: 2, eval_delay: 5 })).toEqual([6, 8]);
		expect(await evaluatedSteps({ eval_strategy: "epoch", eval_on_start: true })).toEqual([0, 4, 8]);
		expect(await evaluatedSteps({ eval_on_start: true })).toEqual([0]);
		expect(await evaluatedSteps({})).toEqual([]);
	});

	it("sums over all targets with the same bits for any batch size and for packing, and writes a line", async () => {
		const run = async (options: Options) => {
			const at = place();
			const all = await events(trainer(at, evaluating(at.heldOut, { eval_on_start: true, ...options })));
			const evaluations = ofType(all, "evaluate").map(({ metrics, highestLosses }) => {
				return { ...metrics, highest_losses: highestLosses };
			});
			const lines = metricsOf(at.out).filter((line) => "eval_loss" in line);
			expect(lines).toEqual(evaluations);
			return evaluations.map(({ eval_runtime: _, eval_samples_per_second: __, highest_losses, ...figures }) => {
				return { ...figures, highest: highest_losses.map((row) => ({ ...row, location: basename(row.location) })) };
			});
		};
		const eight = await run({});
		expect(eight.map(({ step, epoch }) => [step, epoch])).toEqual([
			[0, 0],
			[3, 9 / 11],
			[6, 1 + 6 / 11],
		]);
		expect(eight[0]?.eval_entropy).toBe(0.5);
		expect(eight[0]?.eval_perplexity).toBe(Math.exp(eight[0]?.eval_loss ?? 0));
		expect(eight[0]?.eval_loss).not.toBe(eight[1]?.eval_loss);
		for (const size of [1, 4, 100]) expect(await run({ per_device_eval_batch_size: size })).toEqual(eight);
		// Packing changes the steps of the training, but not what is evaluated before the first.
		expect((await run({ max_tokens_per_micro_batch: 64 }))[0]).toEqual(eight[0]);
	});

	it("changes no step, no weight and no checkpoint of the training", async () => {
		const [plain, evaluated] = [place(), place()];
		const options: Options = { save_strategy: "steps", save_steps: 2 };
		const without = await events(trainer(plain, options));
		const withIt = await events(trainer(evaluated, { ...evaluating(evaluated.heldOut, options), eval_on_start: true }));
		expect(numbers(withIt)).toEqual(numbers(without));
		for (const name of ["model.safetensors", "checkpoint-4/arl/engine.json", "checkpoint-8/model.safetensors"]) {
			expect(readFileSync(join(evaluated.out, name)), name).toEqual(readFileSync(join(plain.out, name)));
		}
	});

	it("reports each of several sources, rows from code among them", async () => {
		const at = place();
		const args = trainer(at, evaluating(`a=${at.heldOut}`, { metric_for_best_model: "eval_dataset_loss" })).args;
		const eval_dataset = [
			{
				messages: [
					{ role: "user", content: "?" },
					{ role: "assistant", content: "code" },
				],
			},
		];
		const options = { args, eval_dataset } as QwenTrainerOptions;
		const all = await events(createTrainer(options, () => fakeNative()));
		const [first] = ofType(all, "evaluate");
		const names = ["loss", "perplexity", "mean_token_accuracy", "entropy"];
		const expected = ["", "a_", "dataset_"].flatMap((source) => names.map((name) => `eval_${source}${name}`));
		expect(Object.keys(first?.metrics ?? {})).toEqual([
			"step",
			"epoch",
			...expected,
			"eval_runtime",
			"eval_samples_per_second",
		]);
		const alone = place();
		const one = await events(trainer(alone, evaluating(alone.heldOut)));
		expect(first?.metrics.eval_a_loss).toBe(ofType(one, "evaluate")[0]?.metrics.eval_loss);
	});

	it("reports its progress where it takes long", async () => {
		const at = place();
		const native = fakeNative({ evaluateMs: 300 });
		const options = { ...evaluating(at.heldOut, { per_device_eval_batch_size: 2 }), max_steps: 3 };
		const progress = ofType(await events(trainer(at, options, native)), "evaluating");
		expect(progress.length).toBeGreaterThan(0);
		expect(progress.every(({ step, rows, totalRows }) => step === 3 && rows > 0 && rows < 9 && totalRows === 9)).toBe(
			true,
		);
	});

	it("needs rows, and a metric that it has", async () => {
		const at = place();
		const none = await errorOf(() => trainer(at, { eval_strategy: "steps" }).train());
		expect(none).toMatchObject({ code: "ARL_CONFIG", message: "eval_strategy steps: no held-out rows are given" });
		const metric = await errorOf(() => trainer(at, evaluating(at.heldOut, { metric_for_best_model: "f1" })).train());
		expect(metric).toMatchObject({ code: "ARL_CONFIG" });
		expect(metric.message).toBe("metric_for_best_model: an evaluation has no eval_f1");
		expect(existsSync(at.out)).toBe(false);
		writeFileSync(at.heldOut, "{}\n");
		const bad = await errorOf(() => trainer(at, evaluating(at.heldOut)).train());
		expect(bad.code).toBe("ARL_DATA");
		expect(bad.message).toContain("held-out.jsonl");
	});

	it("that code asks for comes after the current step, and gives its figures", async () => {
		const at = place();
		const run = trainer(at, { eval_file: at.heldOut, max_steps: 4 });
		const asked: Promise<unknown>[] = [];
		const heard: string[] = [];
		for await (const event of run.run()) {
			if (event.type === "step") heard.push(`step ${event.step}`);
			if (event.type === "evaluate") heard.push(`evaluated ${event.metrics.step}`);
			if (event.type === "step" && event.step === 2) asked.push(run.evaluate(), run.evaluate());
			if (event.type === "evaluate") run.stop();
		}
		expect(heard).toEqual(["step 1", "step 2", "evaluated 2"]);
		const [one, two] = await Promise.all(asked);
		expect(one).toMatchObject({ step: 2 });
		expect(two).toBe(one);
		expect(() => run.save()).toThrow("this trainer has no run in progress");
		const plain = await events(trainer({ ...at, out: `${at.out}-plain` }, { max_steps: 4 }));
		const late = trainer({ ...at, out: `${at.out}-late` }, { eval_file: at.heldOut, max_steps: 4 });
		const all = [];
		let missed: Promise<unknown> | undefined;
		for await (const event of late.run()) {
			all.push(event);
			if (event.type === "step" && event.step === 1) late.evaluate().catch(() => {});
			if (event.type === "end") missed = errorOf(() => late.evaluate());
		}
		expect(numbers(all)).toEqual(numbers(plain));
		expect(await missed).toMatchObject({ code: "ARL_INTERRUPTED" });
		expect(() => trainer(at).evaluate()).toThrow("no run in progress");
	});
});

describe("the best checkpoint", () => {
	/** Losses after each step. */
	const losses = (values: Record<number, number>) => fakeNative({ evalLoss: (steps) => values[steps] ?? 9 });
	const dip = { 2: 3, 4: 1, 6: 2, 8: 2.5 };
	const saving: Options = { eval_steps: 2, save_strategy: "steps", save_steps: 2 };
	const checkpoints = (out: string) => readdirSync(out).filter((name) => name.startsWith("checkpoint"));

	it("is never removed, has a link, and is the model at the end with load_best_model_at_end", async () => {
		const at = place();
		const options = evaluating(at.heldOut, { ...saving, save_total_limit: 1, load_best_model_at_end: true });
		const all = await events(trainer(at, options, losses(dip)));
		expect(ofType(all, "evaluate").map(({ best }) => best)).toEqual([true, true, false, false]);
		expect(checkpoints(at.out)).toEqual(["checkpoint-4", "checkpoint-8"]);
		expect(readlinkSync(join(at.out, "best"))).toBe("checkpoint-4");
		expect(readlinkSync(join(at.out, "latest"))).toBe("checkpoint-8");
		const weights = (name: string) => readFileSync(join(at.out, name, "model.safetensors"));
		expect(weights("")).toEqual(weights("checkpoint-4"));
		expect(weights("")).not.toEqual(weights("checkpoint-8"));
		expect(ofType(all, "end")[0]).toMatchObject({ outcome: "completed", modelPath: at.out });
	});

	it("stays next to as many others as save_total_limit has, itself included", async () => {
		const at = place();
		await events(trainer(at, evaluating(at.heldOut, { ...saving, save_total_limit: 2 }), losses(dip)));
		expect(checkpoints(at.out)).toEqual(["checkpoint-4", "checkpoint-8"]);
		const last = place();
		await events(trainer(last, evaluating(last.heldOut, { ...saving, save_total_limit: 2 }), losses({ 8: 1 })));
		expect(checkpoints(last.out)).toEqual(["checkpoint-6", "checkpoint-8"]);
	});

	it("alone is saved with save_strategy best", async () => {
		const at = place();
		const options = evaluating(at.heldOut, { eval_steps: 2, save_strategy: "best", save_total_limit: 1 });
		const all = await events(trainer(at, options, losses(dip)));
		expect(ofType(all, "saved").map(({ step, reason }) => [step, reason])).toEqual([
			[2, "best"],
			[4, "best"],
		]);
		expect(checkpoints(at.out)).toEqual(["checkpoint-4"]);
		// Without load_best_model_at_end the model is that after the last step.
		const plain = place();
		await events(trainer(plain));
		const weights = (path: string) => readFileSync(join(path, "model.safetensors"));
		expect(weights(at.out)).toEqual(weights(plain.out));
	});

	it("is still the best after a resume from a later one", async () => {
		const at = place();
		const options = evaluating(at.heldOut, { ...saving, save_total_limit: 1, load_best_model_at_end: true });
		const native = losses(dip);
		for await (const event of trainer(at, options, native).run()) if (event.type === "saved" && event.step === 6) break;
		expect(readlinkSync(join(at.out, "latest"))).toBe("checkpoint-6");
		await events(trainer(at, { ...options, resume_from_checkpoint: "latest" }, losses(dip)));
		expect(readlinkSync(join(at.out, "best"))).toBe("checkpoint-4");
		expect(checkpoints(at.out)).toEqual(["checkpoint-4", "checkpoint-8"]);
		const weights = (name: string) => readFileSync(join(at.out, name, "model.safetensors"));
		expect(weights("")).toEqual(weights("checkpoint-4"));
	});

	it("can be resumed from by its link, which then follows the new branch", async () => {
		const at = place();
		const options = evaluating(at.heldOut, saving);
		await events(trainer(at, options, losses(dip)));
		const heard: string[] = [];
		for await (const event of trainer(
			at,
			{ ...options, resume_from_checkpoint: join(at.out, "best") },
			losses({ 6: 0.5 }),
		).run()) {
			if (event.type === "resumed") {
				heard.push(
					event.checkpoint.slice(-12),
					readlinkSync(join(at.out, "latest")),
					readlinkSync(join(at.out, "best")),
				);
			}
		}
		expect(heard).toEqual(["checkpoint-4", "checkpoint-4", "checkpoint-4"]);
		expect(readlinkSync(join(at.out, "best"))).toBe("checkpoint-6");
		expect(readlinkSync(join(at.out, "latest"))).toBe("checkpoint-8");
	});

	it("leaves a folder of the user alone that has the name of a link", async () => {
		const at = place();
		mkdirSync(join(at.out, "best"), { recursive: true });
		writeFileSync(join(at.out, "best", "notes.txt"), "mine");
		await events(trainer(at, evaluating(at.heldOut, saving), losses(dip)));
		expect(readFileSync(join(at.out, "best", "notes.txt"), "utf8")).toBe("mine");
		expect(readlinkSync(join(at.out, "latest"))).toBe("checkpoint-8");
	});
});

describe("early stopping", () => {
	it("ends the run after the patience, with its model saved as after all steps", async () => {
		const at = place();
		const native = fakeNative({ evalLoss: (steps) => ({ 1: 3, 2: 2, 3: 2, 4: 2.5 })[steps] ?? 1 });
		const options = evaluating(at.heldOut, { eval_steps: 1, early_stopping_patience: 2, save_strategy: "epoch" });
		const all = await events(trainer(at, options, native));
		expect(ofType(all, "end")[0]).toMatchObject({
			outcome: "early_stopped",
			steps: 4,
			totalSteps: 8,
			modelPath: at.out,
		});
		expect(ofType(all, "saved").map(({ step }) => step)).toEqual([4]);
		expect(existsSync(join(at.out, "model.safetensors"))).toBe(true);
		// A resumed run is over as well, unless the patience has grown.
		const again = await events(trainer(at, { ...options, resume_from_checkpoint: "latest" }, native));
		expect(ofType(again, "step")).toEqual([]);
		expect(ofType(again, "end")[0]).toMatchObject({ outcome: "early_stopped", steps: 4 });
		const patient = { ...options, resume_from_checkpoint: "latest", early_stopping_patience: 3 };
		const rest = await events(trainer(at, patient, native));
		expect(ofType(rest, "end")[0]).toMatchObject({ outcome: "completed", steps: 8 });
	});
});

describe("a run that is interrupted in an evaluation", () => {
	it("makes it first when it resumes; each evaluation is in metrics.jsonl once", async () => {
		const [whole, cut] = [place(), place()];
		const options = (at: typeof whole) => evaluating(at.heldOut, { eval_steps: 2, per_device_eval_batch_size: 1 });
		await events(trainer(whole, options(whole)));
		const stop = new AbortController();
		const slow = fakeNative({ evaluateMs: 5 });
		const first = await (async () => {
			const all = [];
			for await (const event of trainer(cut, options(cut), slow).run({ signal: stop.signal })) {
				all.push(event);
				if (event.type === "log" && event.metrics.step === 4) setTimeout(() => stop.abort(), 10);
			}
			return all;
		})();
		expect(ofType(first, "evaluate").map(({ metrics }) => metrics.step)).toEqual([2]);
		expect(ofType(first, "end")[0]).toMatchObject({ outcome: "interrupted", steps: 4 });
		const resume = { ...options(cut), resume_from_checkpoint: "latest" };
		// Killed, in effect, right after the evaluation that comes first: it is made again.
		for await (const event of trainer(cut, resume).run()) if (event.type === "evaluate") break;
		const rest = await events(trainer(cut, resume));
		expect(ofType(rest, "resumed")[0]).toMatchObject({ step: 4, evaluates: true });
		expect(ofType(rest, "evaluate").map(({ metrics }) => metrics.step)).toEqual([4, 6, 8]);
		const lines = (out: string) =>
			metricsOf(out).map((line) => [line.step, line.eval_loss ?? line.loss, "eval_loss" in line]);
		expect(lines(cut.out)).toEqual(lines(whole.out));
	});

	it("after the last step is not complete before it resumes", async () => {
		const at = place();
		const options = evaluating(at.heldOut, {
			eval_steps: 4,
			per_device_eval_batch_size: 1,
			save_strategy: "steps",
			save_steps: 4,
			load_best_model_at_end: true,
		});
		const falling = (evaluateMs: number) => fakeNative({ evaluateMs, evalLoss: (steps) => 10 - steps });
		const stop = new AbortController();
		const all = [];
		for await (const event of trainer(at, options, falling(5)).run({ signal: stop.signal })) {
			all.push(event);
			if (event.type === "log" && event.metrics.step === 8) setTimeout(() => stop.abort(), 10);
		}
		expect(ofType(all, "end")[0]).toMatchObject({ outcome: "interrupted", steps: 8 });
		const rest = await events(trainer(at, { ...options, resume_from_checkpoint: "latest" }, falling(0)));
		expect(ofType(rest, "evaluate").map(({ metrics }) => metrics.step)).toEqual([8]);
		expect(ofType(rest, "end")[0]).toMatchObject({ outcome: "completed", modelPath: at.out });
		expect(readlinkSync(join(at.out, "best"))).toBe("checkpoint-8");
		const weights = (name: string) => readFileSync(join(at.out, name, "model.safetensors"));
		expect(weights("")).toEqual(weights("checkpoint-8"));
	});
});
