/** Learning rates that follow evaluations: cases worked by hand after torch's ReduceLROnPlateau and transformers' GreedyLR. */
import { writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { describe, expect, it } from "vitest";
import { MetricSchedule, type MetricScheduleName } from "../src/run/loop/metric-schedules.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { chatRow, events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();

function schedule(
	name: MetricScheduleName,
	kwargs: Record<string, unknown> = {},
	learningRate = 0.1,
	greaterIsBetter = false,
) {
	return new MetricSchedule({ name, learningRate, kwargs, greaterIsBetter });
}

/** The rates after each of these metrics. */
function rates(of: MetricSchedule, metrics: readonly number[]): number[] {
	return metrics.map((metric) => {
		of.step(metric);
		return of.rate;
	});
}

describe("reduce_lr_on_plateau", () => {
	it("lowers the rate once more than patience evaluations in a row were not better", () => {
		const found = rates(schedule("reduce_lr_on_plateau", { patience: 2, factor: 0.5 }), [5, 5, 6, 5, 5, 4, 4, 4, 4]);
		// 5 is the best; three not better: half. One more is not better, 4 is, three are not: half again.
		expect(found).toEqual([0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.025]);
	});

	it("has torch's defaults: a tenth after 11 evaluations that are not better by a ten-thousandth", () => {
		const of = schedule("reduce_lr_on_plateau");
		// Each is better than 5, and not by the threshold: 5 x (1 - 1e-4) = 4.9995.
		const found = rates(of, [5, ...Array.from({ length: 11 }, () => 4.9996)]);
		expect(found.slice(0, 11).every((rate) => rate === 0.1)).toBe(true);
		expect(found[11]).toBeCloseTo(0.01, 15);
		expect(of.state.best).toBe(5);
		of.step(4.9994);
		expect(of.state.best).toBe(4.9994);
	});

	it("waits for the cooldown, never falls below min_lr, and leaves out a change below eps", () => {
		const args = { patience: 0, factor: 0.5, cooldown: 2, min_lr: 0.03 };
		expect(rates(schedule("reduce_lr_on_plateau", args), [1, 1, 1, 1, 1, 1, 1, 1])).toEqual([
			0.1, 0.05, 0.05, 0.05, 0.03, 0.03, 0.03, 0.03,
		]);
		expect(rates(schedule("reduce_lr_on_plateau", { patience: 0, eps: 0.06, factor: 0.5 }), [1, 1])).toEqual([
			0.1, 0.1,
		]);
	});

	it("knows a threshold of its own, and metrics of which more is better", () => {
		const abs = { patience: 0, factor: 0.5, threshold: 0.5, threshold_mode: "abs" };
		expect(rates(schedule("reduce_lr_on_plateau", abs), [5, 4.6, 4.4])).toEqual([0.1, 0.05, 0.05]);
		const max = { patience: 0, factor: 0.5, mode: "max" };
		expect(rates(schedule("reduce_lr_on_plateau", max), [0.5, 0.6, 0.6])).toEqual([0.1, 0.1, 0.05]);
		expect(rates(schedule("reduce_lr_on_plateau", { patience: 0, factor: 0.5 }, 0.1, true), [0.5, 0.6, 0.4])).toEqual([
			0.1, 0.1, 0.05,
		]);
		expect(rates(schedule("reduce_lr_on_plateau", { patience: 1, factor: 0.5 }), [1, Number.NaN, Number.NaN])).toEqual([
			0.1, 0.1, 0.05,
		]);
	});
});

describe("greedy", () => {
	const base = { factor: 0.5, patience: 1, min_lr: 1e-6 };

	it("raises the rate after more than patience better evaluations, and lowers it after as many others", () => {
		expect(rates(schedule("greedy", base), [5, 4, 3, 2, 2, 2, 1])).toEqual([0.1, 0.2, 0.2, 0.4, 0.4, 0.2, 0.2]);
		expect(rates(schedule("greedy", { ...base, max_lr: 0.15 }), [5, 4, 3, 2])).toEqual([0.1, 0.15, 0.15, 0.15]);
	});

	it("passes over evaluations in warmup after it has raised and in cooldown after it has lowered", () => {
		expect(rates(schedule("greedy", { ...base, warmup: 2 }), [5, 4, 3, 2, 1, 0.5])).toEqual([
			0.1, 0.2, 0.2, 0.2, 0.2, 0.4,
		]);
		expect(rates(schedule("greedy", { ...base, cooldown: 2 }), [5, 5, 5, 5, 5, 5, 5])).toEqual([
			0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.025,
		]);
	});

	it("begins again after reset_start lowerings at min_lr", () => {
		// Raised by the first metric, lowered to 0.1, to min_lr (the first of two), and there (the second), which begins again with
		// the first rate and without a best metric.
		const of = schedule("greedy", { factor: 0.5, patience: 0, min_lr: 0.05, reset_start: 2 });
		expect(rates(of, [5, 6, 6, 6, 6])).toEqual([0.2, 0.1, 0.05, 0.1, 0.2]);
	});

	it("smooths by the mean of the last metrics", () => {
		const of = schedule("greedy", { ...base, smooth: true, window_size: 3 });
		rates(of, [10, 8, 6, 4]);
		expect(of.state).toMatchObject({ window: [8, 6, 4], sum: 18, best: 6 });
	});

	it("has transformers' defaults, with a warning where they can only raise the rate", () => {
		const of = schedule("greedy", {}, 2e-5);
		const found = rates(of, [5, ...Array.from({ length: 11 }, () => 5)]);
		expect(found.every((rate) => rate === 2e-5)).toBe(true);
		expect(of.notice).toContain("min_lr of lr_scheduler_type greedy is 0.001, and learning_rate 0.00002");
		expect(schedule("greedy", {}, 0.01).notice).toBeNull();
		expect(
			rates(
				schedule("greedy", {}, 0.01),
				Array.from({ length: 11 }, (_, i) => 20 - i),
			).at(-1),
		).toBe(0.01 / 0.95);
	});
});

describe("arguments", () => {
	it.each([
		["reduce_lr_on_plateau", { gamma: 1 }, "lr_scheduler_type reduce_lr_on_plateau has no such argument"],
		["reduce_lr_on_plateau", { max_lr: 1 }, "has no such argument"],
		["greedy", { factor: 1 }, "factor: expected a number above 0 and below 1, got 1"],
		["greedy", { patience: 1.5 }, "patience: expected a whole number, got 1.5"],
		["greedy", { patience: "3" }, 'patience: expected a number, got "3"'],
		["greedy", { mode: "less" }, 'mode: expected min or max, got "less"'],
		["greedy", { threshold_mode: "x" }, "threshold_mode: expected rel or abs"],
		["greedy", { window_size: 0 }, "window_size: expected a whole number of 1 or more"],
		["reduce_lr_on_plateau", { min_lr: -1 }, "min_lr: expected a number of 0 or more"],
	] as const)("%s %o is refused", async (name, kwargs, message) => {
		const error = await errorOf(() => schedule(name, kwargs));
		expect(error.code).toBe("ARL_CONFIG");
		expect(error.message).toContain(message);
	});
});

describe("a run whose learning rate follows evaluations", () => {
	const losses = [5, 4, 4, 4, 3, 3, 3, 3];
	const native = () => fakeNative({ evalLoss: (steps) => losses[steps - 1] ?? 9 });
	const place = () => {
		const found = workspace(folder);
		const heldOut = join(dirname(found.file), "held-out.jsonl");
		writeFileSync(heldOut, `${chatRow("held out")}\n`);
		return { ...found, heldOut };
	};
	const options = (heldOut: string): Options => ({
		lr_scheduler_type: "reduce_lr_on_plateau",
		lr_scheduler_kwargs: { patience: 1, factor: 0.5 },
		learning_rate: 0.1,
		eval_file: heldOut,
		eval_strategy: "steps",
		eval_steps: 1,
		eval_on_start: true,
		save_strategy: "steps",
		save_steps: 2,
	});

	it("trains the steps after an evaluation at the new rate, and resumes with it", async () => {
		const at = place();
		const all = await events(trainer(at, options(at.heldOut), native()));
		const learningRates = ofType(all, "log").map(({ metrics }) => metrics.learning_rate);
		// 4 is the best after step 2; the evaluations after steps 3 and 4 are not better. 3 after step 5, then 6 and 7 are not.
		expect(learningRates).toEqual([0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025]);
		const part = place();
		for await (const event of trainer(part, options(part.heldOut), native()).run())
			if (event.type === "saved" && event.step === 6) break;
		const rest = await events(trainer(part, { ...options(part.heldOut), resume_from_checkpoint: "latest" }, native()));
		expect(numbers(rest)).toEqual(numbers(all).slice(6));
	});

	it("is another run with other held-out rows, or evaluations at other steps", async () => {
		const at = place();
		for await (const event of trainer(at, options(at.heldOut), native()).run()) if (event.type === "saved") break;
		const resume = { ...options(at.heldOut), resume_from_checkpoint: "latest" };
		const steps = await errorOf(() => trainer(at, { ...resume, eval_steps: 2 }, native()).train());
		expect(steps).toMatchObject({ code: "ARL_STATE" });
		expect(steps.message).toContain("steps between evaluations: 1 -> 2");
		writeFileSync(at.heldOut, `${chatRow("others")}\n`);
		const rows = await errorOf(() => trainer(at, resume, native()).train());
		expect(rows).toMatchObject({ code: "ARL_STATE" });
		expect(rows.message).toContain("held-out rows: ");
	});
});
