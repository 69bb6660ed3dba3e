/** Which evaluation is the best and when a run stops early: cases worked by hand after transformers' Trainer and EarlyStoppingCallback. */
import { describe, expect, it } from "vitest";
import { evalSources, greaterIsBetter, metricName } from "../src/config/eval-sources.js";
import { type BestRules, BestTracker } from "../src/run/eval/best.js";

const rules = (other: Partial<BestRules> = {}): BestRules => ({
	key: "loss",
	greaterIsBetter: false,
	patience: null,
	threshold: 0,
	...other,
});

/** What comes of evaluations of these values, one a step: which were the best so far, and after which the patience is over. */
function follow(values: number[], other: Partial<BestRules> = {}) {
	const tracker = new BestTracker(rules(other), undefined);
	const best: number[] = [];
	let over: number | null = null;
	for (const [i, value] of values.entries()) {
		if (tracker.add(i + 1, value)) best.push(i + 1);
		if (tracker.exhausted) over ??= i + 1;
	}
	return { best, over, state: tracker.state };
}

describe("the best evaluation", () => {
	it("is the one with the least loss, the first of equal ones", () => {
		const { best, state } = follow([3, 2, 2, 2.5, 1, 4]);
		expect(best).toEqual([1, 2, 5]);
		expect(state.best).toEqual({ step: 5, value: 1 });
		expect(state.last).toEqual({ step: 6, value: 4 });
	});

	it("is the one with the greatest metric where greater is better", () => {
		expect(follow([0.1, 0.3, 0.2, 0.4], { greaterIsBetter: true }).best).toEqual([1, 2, 4]);
	});

	it("is never one that is not a number, and may be infinite only until a finite one comes", () => {
		const { best, state } = follow([Number.NaN, Number.POSITIVE_INFINITY, 5, Number.NaN]);
		expect(best).toEqual([2, 3]);
		expect(state.best).toEqual({ step: 3, value: 5 });
	});

	it("has a checkpoint of its own among the evaluations after which one was saved", () => {
		const tracker = new BestTracker(rules(), undefined);
		for (const [step, value, saved] of [
			[1, 3, false],
			[2, 1, false],
			[3, 2, true],
			[4, 2.5, true],
			[5, 1.5, true],
		] as const) {
			tracker.add(step, value);
			if (saved) tracker.saving(step);
		}
		// A save without an evaluation at the same step says nothing.
		tracker.saving(6);
		expect(tracker.state).toMatchObject({ best: { step: 2, value: 1 }, checkpoint: { step: 5, value: 1.5 } });
	});

	it("is known again after a resume, unless rows or metric are others", () => {
		const { state } = follow([3, 2, 4]);
		const again = new BestTracker(rules(), state);
		expect(again.add(4, 2.5)).toBe(false);
		expect(again.state.worse).toBe(2);
		// The state of the checkpoint is not the tracker's.
		expect(state.worse).toBe(1);
		// JSON makes null of what is not finite.
		const odd = JSON.parse(JSON.stringify(follow([Number.POSITIVE_INFINITY, Number.NaN]).state));
		const after = new BestTracker(rules(), odd);
		expect(after.state).toMatchObject({ last: { step: 2, value: Number.NaN }, best: null });
		expect(after.add(3, 7)).toBe(true);
		const other = new BestTracker(rules({ key: "accuracy" }), state);
		expect(other.state).toEqual({ key: "accuracy", last: null, best: null, checkpoint: null, worse: 0 });
	});
});

describe("early stopping", () => {
	it("ends the run after as many evaluations in a row as the patience has, each not better than the best", () => {
		// 3, 2 are better; 2 is equal, 2.5 worse: the second in a row.
		expect(follow([3, 2, 2, 2.5, 1], { patience: 2 }).over).toBe(4);
		expect(follow([3, 2, 2, 1, 1, 1], { patience: 2 }).over).toBe(6);
		expect(follow([3, 2, 1], { patience: 1 }).over).toBeNull();
		expect(follow([3, 3], { patience: 1 }).over).toBe(2);
	});

	it("with a threshold does not count a smaller gain, which yet makes the evaluation the best", () => {
		// From 3 to 2.95 the gain is below 0.1: it is the best, and the first without enough gain. 2.9 again, from 2.95.
		const { best, over } = follow([3, 2.95, 2.9], { patience: 2, threshold: 0.1 });
		expect(best).toEqual([1, 2, 3]);
		expect(over).toBe(3);
		expect(follow([3, 2.95, 2.8], { patience: 2, threshold: 0.1 }).over).toBeNull();
		// A gain of exactly the threshold is not above it.
		expect(follow([3, 2.5], { patience: 1, threshold: 0.5 }).over).toBe(2);
	});

	it("counts a loss that is not a number as not better", () => {
		expect(follow([Number.NaN, Number.NaN], { patience: 2 }).over).toBe(2);
	});
});

describe("names", () => {
	it("of sources are given or those of their files", () => {
		expect(
			evalSources(["gsm=a/b.jsonl", "data/held out.jsonl.gz", "./year=2024/x.parquet", "c=d=e", "folder/"]),
		).toEqual([
			{ name: "gsm", path: "a/b.jsonl" },
			{ name: "held_out", path: "data/held out.jsonl.gz" },
			{ name: "x", path: "./year=2024/x.parquet" },
			{ name: "c", path: "d=e" },
			{ name: "folder", path: "folder/" },
		]);
	});

	it("of metrics are with or without eval_ in front, and say which way is better", () => {
		expect([null, "loss", "eval_loss", "web_loss"].map(metricName)).toEqual([
			"eval_loss",
			"eval_loss",
			"eval_loss",
			"eval_web_loss",
		]);
		const names = ["eval_loss", "eval_web_perplexity", "eval_entropy", "eval_mean_token_accuracy"];
		expect(names.map(greaterIsBetter)).toEqual([false, false, false, true]);
	});
});
