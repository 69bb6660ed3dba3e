/**
 * Learning rate by optimizer step: the schedules of Hugging Face's Trainer, with its names and extra arguments.
 * Pure functions. The rate of step 1 is that of `current = 0`, so a warm-up begins with a rate of 0.
 */
import { METRIC_SCHEDULE_NAMES, SCHEDULE_NAMES } from "../../config/options/training.js";
import { ArlError } from "../../errors.js";

export type ScheduleName = (typeof SCHEDULE_NAMES)[number];

export interface ScheduleOptions {
	/** `lr_scheduler_type`. */
	name: string;
	/** Peak rate. */
	learningRate: number;
	/** A count of steps; below 1: the share of all steps, rounded up (Hugging Face's reading). */
	warmupSteps: number;
	totalSteps: number;
	/** `lr_scheduler_kwargs`. */
	kwargs?: Record<string, unknown>;
}

/** Rate for a step counted from 0. */
export type Schedule = (current: number) => number;

const KWARGS: Record<ScheduleName, readonly string[]> = {
	linear: [],
	cosine: ["num_cycles"],
	cosine_with_restarts: ["num_cycles"],
	polynomial: ["lr_end", "power"],
	constant: [],
	constant_with_warmup: [],
	inverse_sqrt: ["timescale"],
	cosine_with_min_lr: ["num_cycles", "min_lr", "min_lr_rate"],
	cosine_warmup_with_min_lr: ["num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"],
	warmup_stable_decay: [
		"num_decay_steps",
		"num_stable_steps",
		"warmup_type",
		"decay_type",
		"min_lr_ratio",
		"num_cycles",
	],
};

const SHAPES = ["linear", "cosine", "1-sqrt"];

/** Steps whose rates are checked before the run. */
const RATES_CHECKED = 64;

function configError(message: string, hint?: string): ArlError {
	return new ArlError("ARL_CONFIG", message, hint);
}

/** Reads `lr_scheduler_kwargs`, and checks each argument as it is read. */
class Kwargs {
	constructor(
		private readonly schedule: ScheduleName,
		private readonly values: Record<string, unknown>,
	) {
		for (const key of Object.keys(values)) {
			if (!KWARGS[schedule].includes(key)) {
				throw configError(
					`lr_scheduler_kwargs.${key}: lr_scheduler_type ${schedule} has no such argument`,
					`its arguments: ${KWARGS[schedule].join(", ") || "none"}`,
				);
			}
		}
	}

	number(key: string): number | undefined {
		const value = this.values[key];
		if (value === undefined || value === null) return undefined;
		if (typeof value !== "number" || !Number.isFinite(value)) {
			throw configError(`lr_scheduler_kwargs.${key}: expected a finite number, got ${JSON.stringify(value)}`);
		}
		return value;
	}

	shape(key: string, fallback: string): string {
		const value = this.values[key];
		if (value === undefined || value === null) return fallback;
		if (typeof value !== "string" || !SHAPES.includes(value)) {
			throw configError(
				`lr_scheduler_kwargs.${key}: expected one of ${SHAPES.join(", ")}, got ${JSON.stringify(value)}`,
			);
		}
		return value;
	}

	/** `min_lr` or `min_lr_rate`, as a share of the peak rate; exactly one of them must be given. */
	minRate(learningRate: number): number {
		const minLr = this.number("min_lr");
		const minLrRate = this.number("min_lr_rate");
		if (minLr !== undefined && minLrRate !== undefined) {
			throw configError("lr_scheduler_kwargs: min_lr and min_lr_rate contradict each other", "give one of them");
		}
		if (minLr !== undefined && learningRate === 0) {
			throw configError(
				"lr_scheduler_kwargs.min_lr: learning_rate is 0, so it cannot fall to min_lr",
				"raise learning_rate",
			);
		}
		if (minLr !== undefined) return minLr / learningRate;
		if (minLrRate !== undefined) return minLrRate;
		throw configError(
			`lr_scheduler_type ${this.schedule} needs min_lr or min_lr_rate`,
			"for example --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'",
		);
	}
}

/** Steps of the warm-up. `warmup`: a count, or a share of all steps, which is rounded up. */
export function warmupSteps(warmup: number, totalSteps: number): number {
	return warmup >= 1 ? Math.trunc(warmup) : Math.ceil(totalSteps * warmup);
}

function isScheduleName(name: string): name is ScheduleName {
	return (SCHEDULE_NAMES as readonly string[]).includes(name);
}

/**
 * The schedule that the options name. Throws `ARL_CONFIG` for an unknown name or argument, and if the rate of a step is not
 * finite; of a long run, samples of the steps and the end of the warm-up are checked.
 */
export function createSchedule(options: ScheduleOptions): Schedule {
	const { name, learningRate, totalSteps } = options;
	if ((METRIC_SCHEDULE_NAMES as readonly string[]).includes(name)) {
		throw configError(
			`lr_scheduler_type ${name} follows evaluations, and is no function of the step`,
			`Those that are: ${SCHEDULE_NAMES.join(", ")}`,
		);
	}
	if (!isScheduleName(name)) {
		throw configError(
			`lr_scheduler_type: unknown schedule ${JSON.stringify(name)}`,
			`known: ${SCHEDULE_NAMES.join(", ")}`,
		);
	}
	const factor = factorOf(
		name,
		learningRate,
		warmupSteps(options.warmupSteps, totalSteps),
		totalSteps,
		options.kwargs ?? {},
	);
	const schedule: Schedule = (current) => learningRate * factor(current);
	checkRates(schedule, options);
	return schedule;
}

function checkRates(schedule: Schedule, { name, totalSteps, warmupSteps: warmup }: ScheduleOptions): void {
	const last = Math.max(0, totalSteps - 1);
	const risen = warmupSteps(warmup, totalSteps);
	const even = Array.from({ length: RATES_CHECKED }, (_, i) => Math.round((last * i) / (RATES_CHECKED - 1)));
	for (const step of [...even, risen - 1, risen, risen + 1]) {
		if (step < 0 || step > last) continue;
		const rate = schedule(step);
		if (Number.isFinite(rate)) continue;
		throw configError(
			`lr_scheduler_type ${name}: the learning rate of step ${step + 1} of ${totalSteps} is ${rate}`,
			"look at learning_rate, warmup_steps and lr_scheduler_kwargs",
		);
	}
}

/** Share of the peak rate by step. */
function factorOf(
	name: ScheduleName,
	learningRate: number,
	warmup: number,
	total: number,
	values: Record<string, unknown>,
): Schedule {
	const kwargs = new Kwargs(name, values);
	const rise = (current: number) => current / Math.max(1, warmup);
	/** The share of the part after the warm-up that is done. */
	const progress = (current: number) => (current - warmup) / Math.max(1, total - warmup);
	const wave = (cycles: number, at: number) => 0.5 * (1 + Math.cos(Math.PI * cycles * 2 * at));
	const afterWarmup =
		(then: Schedule): Schedule =>
		(current) =>
			current < warmup ? rise(current) : then(current);

	switch (name) {
		case "constant":
			return () => 1;
		case "constant_with_warmup":
			return afterWarmup(() => 1);
		case "linear":
			return afterWarmup((current) => Math.max(0, (total - current) / Math.max(1, total - warmup)));
		case "cosine": {
			const cycles = kwargs.number("num_cycles") ?? 0.5;
			return afterWarmup((current) => Math.max(0, wave(cycles, progress(current))));
		}
		case "cosine_with_restarts": {
			const cycles = kwargs.number("num_cycles") ?? 1;
			return afterWarmup((current) => {
				const at = progress(current);
				return at >= 1 ? 0 : Math.max(0, 0.5 * (1 + Math.cos(Math.PI * ((cycles * at) % 1))));
			});
		}
		case "polynomial": {
			const end = kwargs.number("lr_end") ?? 1e-7;
			const power = kwargs.number("power") ?? 1;
			if (!(learningRate > end)) {
				throw configError(`lr_scheduler_kwargs.lr_end (${end}) must be smaller than learning_rate (${learningRate})`);
			}
			return afterWarmup((current) => {
				if (current > total) return end / learningRate;
				const remaining = 1 - (current - warmup) / (total - warmup);
				return ((learningRate - end) * remaining ** power + end) / learningRate;
			});
		}
		case "inverse_sqrt": {
			const timescale = kwargs.number("timescale") ?? (warmup || 10_000);
			return afterWarmup((current) => 1 / Math.sqrt((current + timescale - warmup) / timescale));
		}
		case "cosine_with_min_lr": {
			const cycles = kwargs.number("num_cycles") ?? 0.5;
			const floor = kwargs.minRate(learningRate);
			return afterWarmup((current) => Math.max(0, wave(cycles, progress(current)) * (1 - floor) + floor));
		}
		case "cosine_warmup_with_min_lr": {
			const cycles = kwargs.number("num_cycles") ?? 0.5;
			const floor = kwargs.minRate(learningRate);
			const first = kwargs.number("warmup_lr_rate");
			return (current) => {
				if (current < warmup) {
					if (first === undefined) return (current + 1) / Math.max(1, warmup);
					return first + ((1 - first) * current) / Math.max(1, warmup - 1);
				}
				const at = (current - warmup + 1) / Math.max(1, total - warmup);
				return Math.max(0, wave(cycles, at) * (1 - floor) + floor);
			};
		}
		case "warmup_stable_decay":
			return warmupStableDecay(kwargs, warmup, total);
	}
}

function warmupStableDecay(kwargs: Kwargs, warmup: number, total: number): Schedule {
	const decay = kwargs.number("num_decay_steps");
	if (decay === undefined) {
		throw configError(
			"lr_scheduler_type warmup_stable_decay needs num_decay_steps",
			"for example --lr_scheduler_kwargs '{\"num_decay_steps\": 100}'",
		);
	}
	const stable = kwargs.number("num_stable_steps") ?? total - warmup - decay;
	const warmupShape = kwargs.shape("warmup_type", "linear");
	const decayShape = kwargs.shape("decay_type", "cosine");
	const floor = kwargs.number("min_lr_ratio") ?? 0;
	const cycles = kwargs.number("num_cycles") ?? 0.5;

	const rising = (at: number) => {
		if (warmupShape === "linear") return at;
		return warmupShape === "cosine" ? 0.5 * (1 - Math.cos(Math.PI * at)) : 1 - Math.sqrt(1 - at);
	};
	const falling = (at: number) => {
		if (decayShape === "linear") return 1 - at;
		return decayShape === "cosine" ? 0.5 * (1 + Math.cos(Math.PI * cycles * 2 * at)) : 1 - Math.sqrt(at);
	};
	return (current) => {
		if (current < warmup) return Math.max(0, rising(current / Math.max(1, warmup)) * (1 - floor) + floor);
		if (current < warmup + stable) return 1;
		if (current < warmup + stable + decay) {
			const at = (current - warmup - stable) / Math.max(1, decay);
			return Math.max(0, falling(at) * (1 - floor) + floor);
		}
		return floor;
	};
}
