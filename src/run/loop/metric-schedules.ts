/**
 * Learning rates that follow evaluations: `reduce_lr_on_plateau`, torch's ReduceLROnPlateau, and `greedy`, transformers' GreedyLR
 * (arXiv 2512.14527). The rate changes after an evaluation alone. Pure rules on a plain state, which a checkpoint keeps.
 */
import type { METRIC_SCHEDULE_NAMES } from "../../config/options/training.js";
import { ArlError } from "../../errors.js";

export type MetricScheduleName = (typeof METRIC_SCHEDULE_NAMES)[number];

/** What a checkpoint keeps of such a schedule. */
export interface MetricScheduleState {
	/** The learning rate. */
	rate: number;
	/** The best metric; null: none so far. */
	best: number | null;
	/** Evaluations in a row that were not better, and that were. */
	bad: number;
	good: number;
	/** Evaluations that are still passed over after a lower and after a higher rate. */
	cooldown: number;
	warmup: number;
	/** Lowerings at `min_lr` until the schedule begins again. */
	resets: number;
	/** With `smooth`: the last metrics, and their sum. */
	window: number[];
	sum: number;
}

export interface MetricScheduleOptions {
	name: MetricScheduleName;
	learningRate: number;
	/** `lr_scheduler_kwargs`. */
	kwargs: Record<string, unknown>;
	/** Whether a greater metric is better, where `mode` does not say. */
	greaterIsBetter: boolean;
}

/** The arguments with their defaults in torch and transformers. */
const DEFAULTS = {
	reduce_lr_on_plateau: {
		factor: 0.1,
		patience: 10,
		threshold: 1e-4,
		threshold_mode: "rel",
		cooldown: 0,
		min_lr: 0,
		eps: 1e-8,
	},
	greedy: {
		factor: 0.95,
		patience: 10,
		threshold: 1e-6,
		threshold_mode: "abs",
		cooldown: 0,
		warmup: 0,
		min_lr: 1e-3,
		max_lr: 1,
		eps: 1e-8,
		smooth: false,
		window_size: 50,
		reset_start: 500,
	},
} as const;

interface Arguments {
	mode: "min" | "max";
	factor: number;
	patience: number;
	threshold: number;
	threshold_mode: "rel" | "abs";
	cooldown: number;
	warmup: number;
	min_lr: number;
	max_lr: number;
	eps: number;
	smooth: boolean;
	window_size: number;
	reset_start: number;
}

/** A schedule, and where it is. */
export class MetricSchedule {
	readonly state: MetricScheduleState;
	private readonly args: Arguments;

	/**
	 * `before`: of the checkpoint that the run resumes from.
	 *
	 * @throws ArlError `ARL_CONFIG` for an unknown or wrong argument.
	 */
	constructor(
		private readonly options: MetricScheduleOptions,
		before?: MetricScheduleState,
	) {
		this.args = readArguments(options);
		this.state =
			before === undefined ? this.start() : { ...before, window: [...before.window], sum: before.sum ?? Number.NaN };
	}

	/** The learning rate of the steps until the next evaluation. */
	get rate(): number {
		return this.state.rate;
	}

	/** For the user: why the arguments do little; null: they do not. */
	get notice(): string | null {
		const { name, learningRate } = this.options;
		if (learningRate > this.args.min_lr || learningRate === 0) return null;
		const bound = `min_lr of lr_scheduler_type ${name} is ${this.args.min_lr}`;
		return `${bound}, and learning_rate ${learningRate}: the rate is never lowered; set min_lr in lr_scheduler_kwargs`;
	}

	/** Takes the metric of an evaluation. */
	step(metric: number): void {
		if (this.options.name === "greedy") this.stepGreedy(metric);
		else this.stepPlateau(metric);
	}

	private start(): MetricScheduleState {
		const { reset_start: resets } = this.args;
		const counters = { bad: 0, good: 0, cooldown: 0, warmup: 0, resets };
		return { rate: this.options.learningRate, best: null, ...counters, window: [], sum: 0 };
	}

	private stepPlateau(metric: number): void {
		const { state, args } = this;
		if (this.isBetter(metric)) {
			state.best = metric;
			state.bad = 0;
		} else state.bad += 1;
		if (state.cooldown > 0) {
			state.cooldown -= 1;
			state.bad = 0;
		}
		if (state.bad <= args.patience) return;
		this.lower();
		state.cooldown = args.cooldown;
		state.bad = 0;
	}

	private stepGreedy(metric: number): void {
		const { state, args } = this;
		const current = args.smooth ? this.smoothed(metric) : metric;
		if (state.cooldown > 0 || state.warmup > 0) {
			if (state.cooldown > 0) state.cooldown -= 1;
			else state.warmup -= 1;
			state.bad = 0;
			state.good = 0;
			return;
		}
		if (this.isBetter(current)) {
			state.best = current;
			state.bad = 0;
			state.good += 1;
		} else {
			state.bad += 1;
			state.good = 0;
		}
		if (state.good > args.patience) {
			const rate = Math.min(state.rate / args.factor, args.max_lr);
			if (rate - state.rate > args.eps) state.rate = rate;
			state.resets = args.reset_start;
			state.warmup = args.warmup;
			state.good = 0;
		} else if (state.bad > args.patience) {
			this.lower();
			const again = state.rate <= args.min_lr && --state.resets <= 0;
			if (again) Object.assign(state, this.start());
			state.cooldown = args.cooldown;
			state.bad = 0;
		}
	}

	private lower(): void {
		const { state, args } = this;
		const rate = Math.max(state.rate * args.factor, args.min_lr);
		if (state.rate - rate > args.eps) state.rate = rate;
	}

	/** The mean of the last metrics, this one included. */
	private smoothed(metric: number): number {
		const { state, args } = this;
		state.window.push(metric);
		state.sum += metric;
		if (state.window.length > args.window_size) state.sum -= state.window.shift() ?? 0;
		return state.sum / state.window.length;
	}

	private isBetter(metric: number): boolean {
		const { mode, threshold, threshold_mode: relative } = this.args;
		const sign = mode === "min" ? -1 : 1;
		const best = this.state.best ?? sign * Number.NEGATIVE_INFINITY;
		const bound = relative === "rel" ? best * (1 + sign * threshold) : best + sign * threshold;
		return mode === "min" ? metric < bound : metric > bound;
	}
}

function readArguments({ name, kwargs, greaterIsBetter }: MetricScheduleOptions): Arguments {
	const defaults: Record<string, unknown> = { mode: greaterIsBetter ? "max" : "min", ...DEFAULTS[name] };
	const refuse = (key: string, expected: string) =>
		new ArlError(
			"ARL_CONFIG",
			`lr_scheduler_kwargs.${key}: expected ${expected}, got ${JSON.stringify(kwargs[key])}`,
			`The arguments of ${name}: ${Object.keys(defaults).join(", ")}`,
		);
	for (const [key, value] of Object.entries(kwargs)) {
		const standard = defaults[key];
		if (!Object.hasOwn(defaults, key)) {
			throw new ArlError(
				"ARL_CONFIG",
				`lr_scheduler_kwargs.${key}: lr_scheduler_type ${name} has no such argument`,
				`Its arguments: ${Object.keys(defaults).join(", ")}`,
			);
		}
		if (typeof value !== typeof standard) throw refuse(key, `a ${typeof standard}`);
		if (typeof value === "number" && !(value >= 0 && Number.isFinite(value)))
			throw refuse(key, "a number of 0 or more");
	}
	const all = {
		warmup: 0,
		max_lr: 1,
		smooth: false,
		window_size: 1,
		reset_start: 0,
		...defaults,
		...kwargs,
	} as Arguments;
	if (!["min", "max"].includes(all.mode)) throw refuse("mode", "min or max");
	if (!["rel", "abs"].includes(all.threshold_mode)) throw refuse("threshold_mode", "rel or abs");
	if (!(all.factor > 0 && all.factor < 1)) throw refuse("factor", "a number above 0 and below 1");
	for (const key of ["patience", "cooldown", "warmup", "window_size", "reset_start"] as const) {
		if (!Number.isInteger(all[key])) throw refuse(key, "a whole number");
	}
	if (all.window_size < 1) throw refuse("window_size", "a whole number of 1 or more");
	return all;
}
