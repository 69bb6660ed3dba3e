import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { SCHEDULE_NAMES } from "../src/config/options/training.js";
import { createSchedule, warmupSteps } from "../src/run/loop/schedules.js";
import { errorOf } from "./support/folder.js";
import { fc, holds } from "./support/properties.js";

interface Case {
	name: string;
	learning_rate: number;
	warmup_steps: number;
	total_steps: number;
	kwargs: Record<string, unknown>;
	rates: number[];
}

const { cases } = JSON.parse(readFileSync(new URL("./fixtures/schedules.json", import.meta.url), "utf8")) as {
	cases: Case[];
};

/** Arguments that each schedule may have, at any peak rate: shares of it, and no rates of their own (`min_lr`, `lr_end`). */
const share = fc.double({ min: 0, max: 1, noNaN: true });
const positive = fc.double({ min: 0.25, max: 3, noNaN: true });
const kwargs = (fields: Record<string, fc.Arbitrary<unknown>>, required: string[] = []) =>
	fc.record(fields, { requiredKeys: required });
const shape = fc.constantFrom("linear", "cosine", "1-sqrt");
const KWARGS: Record<(typeof SCHEDULE_NAMES)[number], fc.Arbitrary<Record<string, unknown>>> = {
	constant: kwargs({}),
	constant_with_warmup: kwargs({}),
	linear: kwargs({}),
	cosine: kwargs({ num_cycles: positive }),
	cosine_with_restarts: kwargs({ num_cycles: positive }),
	polynomial: kwargs({ power: positive }),
	inverse_sqrt: kwargs({ timescale: fc.integer({ min: 1, max: 1000 }) }),
	cosine_with_min_lr: kwargs({ num_cycles: positive, min_lr_rate: share }, ["min_lr_rate"]),
	cosine_warmup_with_min_lr: kwargs({ num_cycles: positive, min_lr_rate: share, warmup_lr_rate: share }, [
		"min_lr_rate",
	]),
	warmup_stable_decay: kwargs(
		{
			num_decay_steps: fc.nat(60),
			num_stable_steps: fc.nat(60),
			warmup_type: shape,
			decay_type: shape,
			min_lr_ratio: share,
			num_cycles: positive,
		},
		["num_decay_steps"],
	),
};
const named = fc
	.constantFrom(...SCHEDULE_NAMES)
	.chain((name) => KWARGS[name].map((given) => ({ name, kwargs: given as Record<string, number | string> })));

type Named = typeof named extends fc.Arbitrary<infer T> ? T : never;

/** The share of the peak rate in a warm-up of `warmup` steps, by transformers' formulas. */
function warmupShare(name: string, given: Record<string, number | string>, current: number, warmup: number): number {
	const at = current / warmup;
	if (name === "constant") return 1;
	if (name === "cosine_warmup_with_min_lr") {
		const first = given.warmup_lr_rate;
		if (typeof first !== "number") return (current + 1) / warmup;
		return first + (1 - first) * (current / Math.max(1, warmup - 1));
	}
	if (name !== "warmup_stable_decay") return at;
	const floor = Number(given.min_lr_ratio ?? 0);
	const rises = { linear: at, cosine: 0.5 * (1 - Math.cos(Math.PI * at)), "1-sqrt": 1 - Math.sqrt(1 - at) };
	return floor + (1 - floor) * rises[(given.warmup_type ?? "linear") as keyof typeof rises];
}

const create = (name: string, kwargs: Record<string, unknown> = {}) =>
	createSchedule({ name, learningRate: 1e-3, warmupSteps: 2, totalSteps: 10, kwargs });

describe("learning-rate schedules", () => {
	it.each(cases)("$name with $kwargs gives transformers' rates to 1e-12", (entry) => {
		const schedule = createSchedule({
			name: entry.name,
			learningRate: entry.learning_rate,
			warmupSteps: entry.warmup_steps,
			totalSteps: entry.total_steps,
			kwargs: entry.kwargs,
		});
		for (const [step, rate] of entry.rates.entries()) {
			expect(Math.abs(schedule(step) - rate), `step ${step}`).toBeLessThanOrEqual(1e-12 * Math.max(rate, 1e-3));
		}
	});

	it("has a case for every schedule", () => {
		expect(new Set(cases.map(({ name }) => name))).toEqual(new Set(SCHEDULE_NAMES));
	});

	it("reads a warm-up below 1 as a share of all steps, rounded up", () => {
		expect(warmupSteps(0.1, 95)).toBe(10);
		expect(warmupSteps(0, 95)).toBe(0);
		expect(warmupSteps(7, 95)).toBe(7);
	});

	it("at learning rate 0 is 0 in every step, except polynomial, which refuses to end above its beginning", () => {
		const steps = fc.tuple(fc.integer({ min: 1, max: 60 }), fc.nat(70));
		const claim = ({ name, kwargs: given }: Named, [totalSteps, warmup]: [number, number]) => {
			const make = () => createSchedule({ name, learningRate: 0, warmupSteps: warmup, totalSteps, kwargs: given });
			if (name === "polynomial") {
				expect(make).toThrow("lr_end");
				return;
			}
			const schedule = make();
			for (let step = 0; step < totalSteps; step++) expect(schedule(step)).toBe(0);
		};
		holds(500, fc.property(named, steps, claim));
	});

	it("that warms up in every step follows the formula of its warm-up to the end", () => {
		const claim = ({ name, kwargs: given }: Named, learningRate: number, totalSteps: number) => {
			for (const warmupSteps of [totalSteps, totalSteps + 1]) {
				const schedule = createSchedule({ name, learningRate, warmupSteps, totalSteps, kwargs: given });
				for (let step = 0; step < totalSteps; step++) {
					const expected = learningRate * warmupShare(name, given, step, warmupSteps);
					expect(Math.abs(schedule(step) - expected), `step ${step}`).toBeLessThanOrEqual(1e-12 * learningRate);
				}
			}
		};
		const rate = fc.double({ min: 1e-6, max: 1, noNaN: true });
		holds(500, fc.property(named, rate, fc.integer({ min: 1, max: 60 }), claim));
	});

	it("refuses an unknown schedule and those that follow an evaluation", async () => {
		expect(await errorOf(() => create("linaer"))).toMatchObject({ code: "ARL_CONFIG" });
		const plateau = await errorOf(() => create("reduce_lr_on_plateau"));
		expect(plateau.code).toBe("ARL_CONFIG");
		expect(plateau.message).toContain("evaluation");
	});

	it("names an argument that the schedule does not have, and what it has", async () => {
		const error = await errorOf(() => create("cosine", { num_cycle: 2 }));
		expect(error.message).toContain("lr_scheduler_kwargs.num_cycle");
		expect(error.hint).toContain("num_cycles");
	});

	it("refuses contradictory, missing and misshapen arguments", async () => {
		for (const [name, kwargs] of [
			["cosine_with_min_lr", {}],
			["cosine_with_min_lr", { min_lr: 1e-5, min_lr_rate: 0.1 }],
			["polynomial", { lr_end: 1 }],
			["warmup_stable_decay", {}],
			["warmup_stable_decay", { num_decay_steps: 2, decay_type: "round" }],
			["cosine", { num_cycles: "many" }],
		] as const) {
			expect(await errorOf(() => create(name, kwargs)), name).toMatchObject({ code: "ARL_CONFIG", exitCode: 2 });
		}
	});
});

describe("at the ends of what may be given", () => {
	const kwargs: Partial<Record<(typeof SCHEDULE_NAMES)[number], Record<string, unknown>[]>> = {
		polynomial: [{}, { power: 2, lr_end: 0 }, { lr_end: 1 }],
		inverse_sqrt: [{}, { timescale: 0 }, { timescale: -3 }],
		cosine_with_min_lr: [{ min_lr: 1e-5 }, { min_lr_rate: 0.1 }],
		cosine_warmup_with_min_lr: [{ min_lr: 1e-5 }, { min_lr_rate: 0.1, warmup_lr_rate: 0 }],
		warmup_stable_decay: [{ num_decay_steps: 0 }, { num_decay_steps: 5 }, { num_decay_steps: 5, num_stable_steps: 0 }],
	};
	it.each(SCHEDULE_NAMES)("%s: every step has a rate that is a number, or the options are refused", (name) => {
		let accepted = 0;
		for (const values of kwargs[name] ?? [{}]) {
			for (const learningRate of [0, 1e-300, 2e-5, 10]) {
				for (const totalSteps of [0, 1, 2, 10]) {
					for (const warmup of [0, 0.5, 1, 10, 20]) {
						const options = { name, learningRate, warmupSteps: warmup, totalSteps, kwargs: values };
						let schedule: ReturnType<typeof createSchedule>;
						try {
							schedule = createSchedule(options);
						} catch (error) {
							expect(error, JSON.stringify(options)).toMatchObject({ code: "ARL_CONFIG" });
							continue;
						}
						accepted += 1;
						for (let step = 0; step < totalSteps; step++) {
							expect(Number.isFinite(schedule(step)), `${JSON.stringify(options)} at ${step}`).toBe(true);
						}
					}
				}
			}
		}
		expect(accepted).toBeGreaterThan(0);
	});
});
