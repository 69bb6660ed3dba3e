/** The evaluation of a run: its held-out rows, the metric that decides, and what is known of the evaluations so far. */
import { FIGURES, greaterIsBetter, metricName } from "../../config/eval-sources.js";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { ArlError } from "../../errors.js";
import type { TrainerState } from "../checkpoint/state.js";
import { MetricSchedule, type MetricScheduleState } from "../loop/metric-schedules.js";
import { stepInterval } from "../setup/options.js";
import { BestTracker } from "./best.js";
import type { HeldOut } from "./evaluate.js";
import { EXACT_MATCH, type Generation } from "./generation.js";

export interface Evaluation {
	heldOut: HeldOut;
	/** `metric_for_best_model` as the evaluation reports it. */
	metric: `eval_${string}`;
	tracker: BestTracker;
	/** Null: no replies are generated. */
	generation: Generation | null;
	/** Null: the learning rate follows the steps. */
	schedule: MetricSchedule | null;
	/** Steps between two evaluations. */
	interval: number;
	/** For the user; null: nothing. */
	notice: string | null;
}

/**
 * Creates the evaluation of a run of `totalSteps` steps. `before`: the state that the run resumes from.
 *
 * @throws ArlError `ARL_CONFIG` for a metric that an evaluation does not have.
 */
export function createEvaluation(
	args: AgentTrainingConfig,
	heldOut: HeldOut,
	totalSteps: number,
	before: TrainerState | null,
	generation: Generation | null,
	ownMetric: boolean,
): Evaluation {
	const metric = metricName(args.metric_for_best_model);
	checkMetric(metric, heldOut, generation !== null, ownMetric);
	const greater = isGreaterBetter(args);
	const key = `${metric} ${greater ? "greater" : "less"} ${heldOut.data.source.identity.slice(0, 16)}`;
	const rules = {
		key,
		greaterIsBetter: greater,
		patience: args.early_stopping_patience,
		threshold: args.early_stopping_threshold,
	};
	const old = before?.evaluation;
	const forgotten = old !== undefined && old.best !== null && old.key !== key;
	return {
		heldOut,
		metric,
		tracker: new BestTracker(rules, old),
		generation,
		schedule: metricScheduleOf(args, before?.schedule),
		interval: stepInterval(args.eval_steps ?? args.logging_steps, totalSteps),
		notice: forgotten
			? "the held-out rows or metric_for_best_model are not those of the earlier part of the run: which checkpoint was the best is forgotten"
			: null,
	};
}

function isGreaterBetter({ greater_is_better: given, metric_for_best_model: metric }: AgentTrainingConfig): boolean {
	return given ?? greaterIsBetter(metricName(metric));
}

/** The schedule of a learning rate that follows evaluations; null: it follows the steps. Throws `ARL_CONFIG` for wrong arguments. */
export function metricScheduleOf(args: AgentTrainingConfig, before?: MetricScheduleState): MetricSchedule | null {
	const { lr_scheduler_type: name, lr_scheduler_kwargs: kwargs, learning_rate: learningRate } = args;
	if (name !== "reduce_lr_on_plateau" && name !== "greedy") return null;
	return new MetricSchedule({ name, learningRate, kwargs, greaterIsBetter: isGreaterBetter(args) }, before);
}

function checkMetric(metric: string, { parts }: HeldOut, generates: boolean, ownMetric: boolean): void {
	// Only the function itself knows the names of its figures.
	if (ownMetric) return;
	const figures: string[] = [...FIGURES, ...(generates ? [EXACT_MATCH] : [])];
	const sources = parts.length > 1 ? parts.map(({ name }) => `${name}_`) : [];
	const known = ["", ...sources].flatMap((source) => figures.map((figure) => `${source}${figure}`));
	if (known.some((name) => metric === `eval_${name}`)) return;
	throw new ArlError(
		"ARL_CONFIG",
		`metric_for_best_model: an evaluation has no ${metric}`,
		`It has ${known.map((name) => `eval_${name}`).join(", ")}.`,
	);
}
