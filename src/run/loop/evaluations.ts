/** The evaluations of a run: when one is due, its event, and when the run stops early. */
import { epochAfter, type StepPlace } from "../../data/sampler/batches.js";
import { ArlError } from "../../errors.js";
import type { EvaluationMetrics, TrainEvent } from "../../events.js";
import { evaluateRows } from "../eval/evaluate.js";
import type { PreparedRun } from "../setup/prepare.js";

export class Evaluations {
	/** Of the last evaluation in this process. */
	private last: EvaluationMetrics | null = null;
	/** The evaluation that was due last was interrupted: the run is not complete without it. */
	cut = false;

	constructor(
		private readonly prepared: PreparedRun,
		private readonly signal: AbortSignal | null,
	) {}

	/** The run ends, because no evaluation has been better for long. */
	get exhausted(): boolean {
		return this.prepared.evaluation?.tracker.exhausted ?? false;
	}

	/** Whether an evaluation is due after this step (from 1), as transformers counts. */
	dueAfter(step: number, place: StepPlace): boolean {
		const { evaluation, run } = this.prepared;
		const { eval_strategy: strategy, eval_delay: delay } = run.args;
		if (evaluation === null || strategy === "no") return false;
		if (strategy === "epoch") return place.lastOfEpoch && delay <= epochAfter(place);
		return step % evaluation.interval === 0 && delay <= step;
	}

	/** Whether the earlier part of the run ended between its last step and the evaluation that was due. */
	get missed(): boolean {
		const { data, evaluation, run } = this.prepared;
		const { step } = run.counters;
		if (run.resumed === null || evaluation === null || step === 0) return false;
		return evaluation.tracker.state.last?.step !== step && this.dueAfter(step, data.plan.place(step - 1));
	}

	/** Whether an evaluation comes before the next step of this process. */
	get dueAtStart(): boolean {
		const { args, resumed } = this.prepared.run;
		return this.missed || (args.eval_on_start && resumed === null);
	}

	/** The evaluation before the first step of this process. */
	async *runFirst(): AsyncGenerator<TrainEvent, void> {
		const { missed } = this;
		const { evaluation, run } = this.prepared;
		if (missed) {
			yield* this.runDue();
			// The run resumes from the checkpoint of this step.
			evaluation?.tracker.saving(run.counters.step);
		} else if (this.dueAtStart) yield* this.run(false);
	}

	/** The evaluation that is due after the last step. */
	async *runDue(): AsyncGenerator<TrainEvent, void> {
		this.cut = this.signal?.aborted === true || (yield* this.run(true)) === null;
	}

	/**
	 * Evaluates with the weights as they are. Null: `signal` ended it. `counts`: it may be the best one, and the patience counts
	 * it; an evaluation that someone asked for, or before the first step, does neither, as in transformers.
	 */
	async *run(counts: boolean): AsyncGenerator<TrainEvent, EvaluationMetrics | null> {
		const { data, engine, evaluation, run } = this.prepared;
		const { step } = run.counters;
		if (evaluation === null) throw new ArlError("ARL_INTERNAL", "an evaluation without held-out rows");
		if (this.last?.step === step) return this.last;
		const started = performance.now();
		const found = yield* evaluateRows(engine.native, evaluation.heldOut, step, this.signal);
		if (found === null) return null;
		const seconds = (performance.now() - started) / 1000;
		const place = { step, epoch: step > 0 ? epochAfter(data.plan.place(step - 1)) : 0 };
		const generated = await evaluation.generation?.run(
			engine.native,
			place,
			this.signal ?? new AbortController().signal,
		);
		if (generated === null) return null;
		const metrics: EvaluationMetrics = {
			...place,
			...found.figures,
			...generated?.figures,
			eval_runtime: seconds,
			eval_samples_per_second: found.rows / Math.max(seconds, 1e-9),
		};
		const value = metrics[evaluation.metric];
		if (value === undefined) {
			const names = Object.keys(metrics).filter((name) => name.startsWith("eval_"));
			const message = `metric_for_best_model: the evaluation has no ${evaluation.metric}`;
			throw new ArlError("ARL_CONFIG", message, `It has ${names.join(", ")}.`);
		}
		const best = counts && evaluation.tracker.add(step, value);
		if (counts) evaluation.schedule?.step(value);
		this.last = metrics;
		yield { type: "evaluate", metrics, best, highestLosses: found.highestLosses };
		for (const sample of generated?.samples ?? []) yield { type: "sample", sample };
		return metrics;
	}
}
