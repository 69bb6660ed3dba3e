/**
 * The loop: takes all steps of a prepared run, and yields an event for whatever happens. Counting, logging and saving are called
 * from here alone.
 */
import { basename } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { unlessAborted } from "../../data/cancellation.js";
import { epochAfter } from "../../data/sampler/batches.js";
import type { AnySource } from "../../data/sources/source.js";
import { makeFolder } from "../../disk/folders.js";
import { ArlError } from "../../errors.js";
import {
	type EndEvent,
	type EvaluationMetrics,
	notice,
	type StartEvent,
	type StepEvent,
	type TrainEvent,
} from "../../events.js";
import { setBranchAside, setOldRunAside, settleOldRun } from "../checkpoint/old-run.js";
import { differences, freeOf, meshChange } from "../checkpoint/state.js";
import { microBatchesOfStep } from "../setup/options.js";
import type { PreparedRun } from "../setup/prepare.js";
import type { Resources } from "../setup/resources.js";
import { fillEvent, noteEvents } from "../setup/rows.js";
import type { Run } from "../setup/run.js";
import { commit, flush, waitFor } from "./commit-hooks.js";
import { Evaluations } from "./evaluations.js";
import type { Requests } from "./requests.js";
import { Saves } from "./saves.js";
import { flopsOf, StepQueue } from "./step.js";
import { TrainedRows } from "./trained-rows.js";

/** Takes all steps of a prepared run. What it opens is closed with `resources`. */
export async function* trainLoop(
	prepared: PreparedRun,
	requests: Requests,
	resources: Resources,
): AsyncGenerator<TrainEvent, void> {
	const { data, engine, run } = prepared;
	const { args, counters, hooks } = run;
	const evaluations = new Evaluations(prepared, requests.signal);
	const saves = new Saves(prepared);
	const trained = new TrainedRows(data.source);
	yield* begin(prepared, saves, evaluations.missed);
	const queue = new StepQueue(engine, data, args, counters.step);
	resources.add(() => queue.end());
	const { step: firstStep, lossSum: lossBefore } = counters;
	const started = performance.now();
	let mark = started;
	let filling = !data.prefetcher.complete;
	let last: StepEvent | null = null;
	// A step that was skipped does not move the schedule, as in Hugging Face's Trainer.
	const following = prepared.evaluation?.schedule ?? null;
	const rateAfter = (steps: number) => following?.rate ?? run.schedule(steps - counters.skippedSteps);

	if (evaluations.dueAtStart) {
		yield* evaluations.runFirst();
		await saves.link();
		mark = performance.now();
	}
	while (queue.rows !== null && !requests.ended && !evaluations.exhausted) {
		const waiting = performance.now();
		const rows = yield* waitFor(hooks, unlessAborted(queue.rows, requests.signal));
		if (rows === null) break;
		const dataSeconds = (performance.now() - waiting) / 1000;
		const step = counters.step + 1;
		const submitted = await queue.take(step, rows, rateAfter(step - 1));
		const finishing = queue.finish(submitted);
		// The next rows are put together while the engine computes this step, and queued behind it. A checkpoint does not wait
		// for another step; and with fp16 whether this one is skipped decides the next one's loss scale and learning rate.
		queue.prepare(step);
		const evaluates = evaluations.dueAfter(step, rows.place);
		const saved = saves.dueAfter(step, rows.place) !== null;
		if (!args.fp16 && !saved && !evaluates) queue.follow(submitted, rateAfter(step));
		const stats = await finishing;
		const now = performance.now();
		const { totalSteps } = data.plan;
		last = counters.count({
			place: rows.place,
			stats,
			learningRate: submitted.learningRate,
			flops: flopsOf(rows.batches, engine.native.info()),
			totalSteps,
			time: {
				seconds: (now - mark) / 1000,
				dataSeconds,
				secondsLeft: ((now - started) / 1000 / (step - firstStep)) * (totalSteps - step),
			},
		});
		mark = now;
		trained.add(step, rows, stats);
		yield last;
		if (last.skipped) yield skippedNotice(last);
		if (filling && data.prefetcher.complete) {
			filling = false;
			yield fillEvent(args, data.prefetcher);
			yield* noteEvents(data.prefetcher);
		}
		const isFirst = step === 1 && args.logging_first_step;
		if (step % run.logInterval === 0 || step === data.plan.totalSteps || isFirst) yield counters.log(last);
		if (rows.place.lastOfEpoch) {
			yield* trained.report(last);
			trained.endEpoch();
			yield { type: "epoch", epoch: rows.place.epoch + 1, step };
		}
		if (evaluates) yield* evaluations.runDue();
		const asked = requests.takeEvaluations();
		if (asked !== null) {
			await queue.withdraw();
			let metrics: EvaluationMetrics | null = null;
			try {
				metrics = yield* evaluations.run(false);
			} finally {
				asked(metrics);
			}
		}
		const requested = requests.takeSave() ? "requested" : null;
		const reason = saves.dueAfter(step, rows.place) ?? requested;
		if (reason !== null) {
			yield* trained.report(last);
			yield* saves.save(reason);
		}
		// Evaluating and saving are no part of the next step's time.
		if (evaluates || asked !== null || reason !== null) mark = performance.now();
	}
	await queue.end();

	// Rows that were encoded while the last steps ran.
	yield* noteEvents(data.prefetcher);
	const { step } = counters;
	// The end of the rows has shown that the last step was the last one.
	const done = (step >= data.plan.totalSteps || evaluations.exhausted) && !evaluations.cut;
	if (last !== null && counters.window.steps > 0 && done) yield counters.log(last);
	if (last !== null) yield* trained.report(last);
	const seconds = (performance.now() - started) / 1000;
	const trainLoss = step > firstStep ? (counters.lossSum - lossBefore) / (step - firstStep) : null;
	const all = step >= data.plan.totalSteps ? "completed" : "early_stopped";
	const early = requests.signal?.aborted ? "interrupted" : "stopped";
	yield* finish(prepared, done ? all : early, saves, { seconds, trainLoss });
	if (data.plan.totalSteps < step) throw new ArlError("ARL_INTERNAL", "more steps were taken than planned");
}

/** Sets aside an old run, and reports the start. All checks have passed. */
async function* begin(prepared: PreparedRun, saves: Saves, evaluates: boolean): AsyncGenerator<TrainEvent, void> {
	const { data, run } = prepared;
	const { args, counters, hooks, resumed } = run;
	await makeFolder(args.output_dir);
	yield* setAside(run);
	if (resumed) {
		// A link may point at a checkpoint of the branch that was set aside.
		await saves.link();
		const changed = differences(resumed.state.free, freeOf(args));
		const again = evaluates && { evaluates };
		const mesh = meshChange(resumed.state.free, freeOf(args));
		if (mesh !== null) yield notice("info", mesh);
		yield { type: "resumed", step: counters.step, checkpoint: resumed.path, changed, ...again };
	}
	await hooks?.begin();
	yield startEvent(prepared);
	if (!resumed) return;
	// The earlier part of the run may have ended before this was recorded.
	yield* commit(hooks, data.plan, counters.step);
	yield* flush(hooks);
}

/** Sets aside what the run replaces, until it has a checkpoint or a model. */
async function* setAside({ args, resumed, datasetId }: Run): AsyncGenerator<TrainEvent, void> {
	const { output_dir: outputDir } = args;
	const ours = args.cache_dir === null ? datasetId : null;
	const old = args.overwrite_output_dir ? await setOldRunAside(outputDir, ours) : null;
	const branch = resumed ? await setBranchAside(outputDir, resumed.state.step) : null;
	const until = "until this run has a complete checkpoint or model, and then removed";
	if (old !== null) yield notice("info", `what was in ${outputDir} is set aside ${until}: ${old}`);
	if (branch === null) return;
	const what = `checkpoints after step ${resumed?.state.step} are not of this run`;
	yield notice("warning", `${what}, and are set aside ${until}: ${branch}`);
}

function startEvent({ data, engine, run }: PreparedRun): StartEvent {
	const { args, counters } = run;
	const { plan, source } = data;
	const { modelType, parameters, device, dtype, flopsPerToken, attentionFlops } = engine.native.info();
	const { categories, totalBytes, hostCategories, hostBytes } = engine.memory;
	const stepsPerEpoch = plan.stepsOf(0);
	return {
		type: "start",
		model: { path: args.model_name_or_path, modelType, parameters, device, dtype, flopsPerToken, attentionFlops },
		data: {
			source: sourceName(args, source),
			shape: data.shape,
			rows: source.length,
			unbounded: data.unbounded,
			rowsPerEpoch: data.order.rowsPerEpoch,
			cached: data.prefetcher.pending === 0,
		},
		memory: { categories, totalBytes, hostCategories, hostBytes },
		outputDir: args.output_dir,
		totalSteps: plan.totalSteps,
		stepsPerEpoch,
		epochs: args.max_steps > 0 ? plan.totalSteps / stepsPerEpoch : args.num_train_epochs,
		microBatchesPerStep: microBatchesOfStep(args),
		firstStep: counters.step,
		seed: args.seed,
	};
}

/** Where the rows come from, for the user. */
function sourceName(args: AgentTrainingConfig, source: AnySource): string {
	const oneFile = args.train_file.length === 1 && args.db_connection_string === null && !source.lazy;
	return oneFile ? basename(args.train_file[0] ?? source.name) : source.name;
}

/** Reports a step in float16 that changed nothing. */
function skippedNotice({ step, loss, gradNorm, lossScale = 1 }: StepEvent): TrainEvent {
	const what = Number.isFinite(loss) ? `the gradient's norm is ${gradNorm}` : `the loss is ${loss}`;
	const scales = `at a loss scale of ${lossScale}; the next one's is ${lossScale / 2}`;
	return notice("info", `step ${step} is skipped: ${what} ${scales}`);
}

/** Saves and publishes the model, and reports the end. */
async function* finish(
	{ data, run }: PreparedRun,
	outcome: EndEvent["outcome"],
	saves: Saves,
	sums: { seconds: number; trainLoss: number | null },
): AsyncGenerator<TrainEvent, void> {
	const { args, counters, hooks } = run;
	const { plan, source } = data;
	const { step } = counters;
	// Where all rows were read first, this was reported before.
	if (source.lazy?.inOrder && source.leftOut)
		yield notice("info", `the converting function has left out ${source.leftOut} rows of ${source.name}`);
	const modelPath = yield* saves.finish(outcome === "completed" || outcome === "early_stopped");
	yield* flush(hooks);
	const restored = await settleOldRun(args.output_dir);
	if (restored !== null) yield notice("warning", `no step was saved. ${restored}`);
	yield {
		type: "end",
		outcome,
		steps: step,
		totalSteps: plan.totalSteps,
		epoch: step > 0 ? epochAfter(plan.place(step - 1)) : 0,
		trainLoss: sums.trainLoss,
		seconds: sums.seconds,
		numTokens: counters.numTokens,
		modelPath,
		outputDir: args.output_dir,
	};
}
