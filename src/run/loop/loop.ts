/**
 * The loop itself: steps, what is logged of them, when a checkpoint is written, and how a run ends.
 * Everything it works on is prepared; it yields an event for whatever happens.
 */

import { join } from "node:path";
import { unlessAborted } from "../../data/cancellation.js";
import { epochAfter, type StepPlace } from "../../data/sampler/batches.js";
import { makeFolder } from "../../disk/folders.js";
import { ArlError } from "../../errors.js";
import type { EndEvent, LogEvent, SavedEvent, StepEvent, TrainEvent } from "../../events.js";
import { METRICS_FILE, MetricsFile } from "../../report/metrics.js";
import { listCheckpoints, removeCheckpoint, saveCheckpoint } from "../checkpoint/checkpoint.js";
import { removeOldRun, setBranchAside, setOldRunAside, settleOldRun } from "../checkpoint/old-run.js";
import { publishCheckpoint, publishEngine } from "../checkpoint/publish.js";
import { emptyWindow } from "../checkpoint/state.js";
import { changedOptions, type PreparedRun, sourceName } from "../setup/prepare.js";
import type { Resources } from "../setup/resources.js";
import { fillEvent, noteEvents } from "../setup/rows.js";
import { commit, settle, waitFor } from "./commit-hooks.js";
import { addToWindow, type Counters, countersOf, logEvent, nextLearningRate, stateOf, stepEvent } from "./counters.js";
import { finishStep, prepareStep, StepSubmitter } from "./step.js";

/** Ways to end a run before its last step. */
export interface StopRequest {
	/** From outside: a signal of the system or of the caller. */
	signal: AbortSignal | null;
	/** From a callback. */
	stopped(): boolean;
}

/** Why a checkpoint is due after this step; null: it is not. */
function saveReason(run: PreparedRun, step: number, place: StepPlace): SavedEvent["reason"] | null {
	const { save_strategy: strategy } = run.args;
	if (strategy === "no") return null;
	if (step === run.plan.totalSteps) return "end";
	if (strategy === "epoch") return place.lastOfEpoch ? "epoch" : null;
	return step % run.saveInterval === 0 ? "steps" : null;
}

async function* save(
	run: PreparedRun,
	counters: Counters,
	reason: SavedEvent["reason"],
): AsyncGenerator<TrainEvent, string> {
	const { args, prefetcher, engine } = run;
	const started = performance.now();
	prefetcher.sync();
	if (run.hooks) yield* waitFor(run.hooks, run.hooks.beforeSave());
	const { path, bytes } = await saveCheckpoint(engine, args.output_dir, stateOf(run, counters));
	const replaced = await removeOldRun(args.output_dir);
	yield { type: "saved", step: counters.step, path, bytes, seconds: (performance.now() - started) / 1000, reason };
	if (replaced !== null) yield { type: "removed", path: replaced, reason: "replaced" };
	yield* commit(run.hooks, run.plan, counters.step);
	if (args.save_total_limit !== null) {
		const standing = await listCheckpoints(args.output_dir);
		const others = standing.filter((checkpoint) => checkpoint.step !== counters.step);
		for (const checkpoint of others.slice(0, Math.max(0, standing.length - args.save_total_limit))) {
			await removeCheckpoint(checkpoint);
			yield { type: "removed", path: checkpoint.path, reason: "save_total_limit" };
		}
	}
	return path;
}

function startEvent(run: PreparedRun, firstStep: number): TrainEvent {
	const { args, engine, plan, source } = run;
	const { categories, totalBytes, hostCategories, hostBytes } = run.memory;
	const info = engine.info();
	const stepsPerEpoch = plan.stepsOf(0);
	return {
		type: "start",
		model: {
			path: args.model_name_or_path,
			modelType: info.modelType,
			parameters: info.parameters,
			device: info.device,
			dtype: info.dtype,
			flopsPerToken: info.flopsPerToken,
			attentionFlops: info.attentionFlops,
		},
		data: {
			source: sourceName(args, source),
			shape: run.shape,
			rows: source.length,
			unbounded: run.unbounded !== null,
			rowsPerEpoch: run.order.rowsPerEpoch,
			cached: run.cached,
		},
		memory: { categories, totalBytes, hostCategories, hostBytes },
		outputDir: args.output_dir,
		totalSteps: plan.totalSteps,
		stepsPerEpoch,
		epochs: args.max_steps > 0 ? plan.totalSteps / stepsPerEpoch : args.num_train_epochs,
		microBatchesPerStep: args.gradient_accumulation_steps,
		firstStep,
		seed: args.seed,
	};
}

/** That a step in float16 changed nothing. */
function skippedNotice({ step, loss, gradNorm, lossScale = 1 }: StepEvent): TrainEvent {
	const what = Number.isFinite(loss) ? `the gradient's norm is ${gradNorm}` : `the loss is ${loss}`;
	const message = `step ${step} is skipped: ${what} at a loss scale of ${lossScale}; the next one's is ${lossScale / 2}`;
	return { type: "notice", level: "info", message };
}

/** Sets aside what the run takes the place of, until it has something to show itself. */
async function* setAside({ args, resumed, datasetId }: PreparedRun): AsyncGenerator<TrainEvent, void> {
	const { output_dir: outputDir } = args;
	const ours = args.cache_dir === null ? datasetId : null;
	const old = args.overwrite_output_dir ? await setOldRunAside(outputDir, ours) : null;
	const branch = resumed ? await setBranchAside(outputDir, resumed.state.step) : null;
	const until = "until this run has a complete checkpoint or model, and then removed";
	if (old !== null) {
		yield { type: "notice", level: "info", message: `what was in ${outputDir} is set aside ${until}: ${old}` };
	}
	if (branch !== null) {
		const message = `checkpoints after step ${resumed?.state.step} are not of this run, and are set aside ${until}: ${branch}`;
		yield { type: "notice", level: "warning", message };
	}
}

/** Takes all steps of a prepared run. What it opens is closed with `resources`. */
export async function* trainLoop(
	run: PreparedRun,
	stop: StopRequest,
	resources: Resources,
): AsyncGenerator<TrainEvent, void> {
	const { args, resumed } = run;
	const counters = countersOf(run);
	await makeFolder(args.output_dir);
	yield* setAside(run);
	const isResumed = args.resume_from_checkpoint !== null;
	const metrics = MetricsFile.open(join(args.output_dir, METRICS_FILE), isResumed ? counters.step : undefined);
	resources.add(() => metrics.close());
	if (resumed) {
		yield { type: "resumed", step: counters.step, checkpoint: resumed.path, changed: changedOptions(resumed, args) };
	}
	await run.hooks?.begin();
	yield startEvent(run, counters.step);
	// What the earlier part of the run may not have got through with.
	if (resumed) {
		yield* commit(run.hooks, run.plan, counters.step);
		yield* settle(run.hooks);
	}
	const submitter = new StepSubmitter(run);
	resources.add(() => submitter.end());
	yield* steps(run, { counters, stop, metrics, submitter });
	if (run.plan.totalSteps < counters.step) throw new ArlError("ARL_INTERNAL", "more steps were taken than planned");
}

interface Steps {
	counters: Counters;
	stop: StopRequest;
	metrics: MetricsFile;
	submitter: StepSubmitter;
}

async function* steps(
	run: PreparedRun,
	{ counters, stop, metrics, submitter }: Steps,
): AsyncGenerator<TrainEvent, void> {
	const { args } = run;
	const firstStep = counters.step;
	const lossBefore = counters.lossSum;
	const started = performance.now();
	let savedAt = run.resumed?.state.step ?? -1;
	let savedPath = run.resumed?.path ?? null;
	let mark = started;
	let filling = !run.prefetcher.complete;
	let last: StepEvent | null = null;
	let next = counters.step < run.plan.totalSteps ? prepareStep(run, counters.step) : null;
	next?.catch(() => {});

	while (next !== null && !stop.signal?.aborted && !stop.stopped()) {
		const waiting = performance.now();
		const prepared = yield* waitFor(run.hooks, unlessAborted(next, stop.signal));
		if (prepared === null) break;
		const dataSeconds = (performance.now() - waiting) / 1000;
		const step = counters.step + 1;
		const submitted = await submitter.take(step, prepared, nextLearningRate(run, counters));
		const running = finishStep(run, submitted);
		// The next batch is put together while the engine computes this one, and queued behind it. A checkpoint does not wait
		// for another step; and with fp16 whether this one is skipped decides the next one's loss scale and learning rate.
		next = step < run.plan.totalSteps ? prepareStep(run, step) : null;
		next?.catch(() => {});
		if (next !== null && !args.fp16 && saveReason(run, step, prepared.place) === null) {
			submitter.follow(submitted, next, nextLearningRate(run, counters, 1));
		}
		const stats = await running;
		const now = performance.now();
		const event = stepEvent(run, counters, prepared, stats, { seconds: (now - mark) / 1000, dataSeconds });
		mark = now;
		event.secondsLeft = ((now - started) / 1000 / (step - firstStep)) * (run.plan.totalSteps - step);
		addToWindow(counters.window, stats, event);
		yield event;
		if (event.skipped) yield skippedNotice(event);
		if (filling && run.prefetcher.complete) {
			filling = false;
			yield fillEvent(run.args, run.prefetcher);
			yield* noteEvents(run.prefetcher);
		}
		last = event;
		if (step % run.logInterval === 0 || step === run.plan.totalSteps || (step === 1 && args.logging_first_step)) {
			yield writeLog(run, counters, event, metrics);
		}
		if (prepared.place.lastOfEpoch) yield { type: "epoch", epoch: prepared.place.epoch + 1, step };
		const reason = saveReason(run, step, prepared.place);
		if (reason !== null) {
			savedPath = yield* save(run, counters, reason);
			savedAt = step;
			// Saving is no part of the next step's time.
			mark = performance.now();
		}
	}
	await submitter.end();

	// Rows that were encoded while the last steps ran.
	yield* noteEvents(run.prefetcher);
	// Nobody knew of the last step that it was the last.
	if (last !== null && counters.window.steps > 0 && counters.step === run.plan.totalSteps) {
		yield writeLog(run, counters, last, metrics);
	}
	yield* finish(run, counters, stop, {
		seconds: (performance.now() - started) / 1000,
		trainLoss: counters.step > firstStep ? (counters.lossSum - lossBefore) / (counters.step - firstStep) : null,
		saved: savedAt === counters.step ? savedPath : null,
	});
}

/** Logs the steps since the last log line. */
function writeLog(run: PreparedRun, counters: Counters, last: StepEvent, metrics: MetricsFile): LogEvent {
	const log = logEvent(counters, last);
	const { args } = run;
	counters.window = emptyWindow();
	metrics.write({ ...log.metrics, ...(args.run_name !== null && { run_name: args.run_name }) });
	return log;
}

/** The last checkpoint, the model in its place, and the last event. */
async function* finish(
	run: PreparedRun,
	counters: Counters,
	stop: StopRequest,
	done: { seconds: number; trainLoss: number | null; saved: string | null },
): AsyncGenerator<TrainEvent, void> {
	const { args, plan, engine, source } = run;
	// Of rows that were all read first it was told before.
	if (source.lazy?.inOrder && source.leftOut) {
		const message = `the converting function has left out ${source.leftOut} rows of ${source.name}`;
		yield { type: "notice", level: "info", message };
	}
	const outcome: EndEvent["outcome"] =
		counters.step >= plan.totalSteps ? "completed" : stop.signal?.aborted ? "interrupted" : "stopped";
	let { saved } = done;
	let modelPath = saved;
	if (outcome === "completed") {
		if (saved === null && args.save_strategy !== "no") saved = yield* save(run, counters, "end");
		if (saved !== null) await publishCheckpoint(saved, args.output_dir);
		else {
			if (run.hooks) yield* waitFor(run.hooks, run.hooks.beforeSave());
			await publishEngine(engine, args.output_dir);
			const replaced = await removeOldRun(args.output_dir);
			if (replaced !== null) yield { type: "removed", path: replaced, reason: "replaced" };
			yield* commit(run.hooks, run.plan, counters.step);
		}
		modelPath = args.output_dir;
	} else if (saved === null && counters.step > 0) {
		// Also with save_strategy no: whoever stops a run wants to go on with it.
		saved = yield* save(run, counters, "interrupted");
		modelPath = saved;
	}
	yield* settle(run.hooks);
	const restored = await settleOldRun(args.output_dir);
	if (restored !== null) yield { type: "notice", level: "warning", message: `no step was saved. ${restored}` };
	yield {
		type: "end",
		outcome,
		steps: counters.step,
		totalSteps: plan.totalSteps,
		epoch: counters.step > 0 ? epochAfter(run.plan.place(counters.step - 1)) : 0,
		trainLoss: done.trainLoss,
		seconds: done.seconds,
		numTokens: counters.numTokens,
		modelPath,
		outputDir: args.output_dir,
	};
}
