/**
 * Prepares a run: its output folder, what it starts from, its rows, and the engine. The caller closes everything, through
 * `Resources`.
 */
import { rm } from "node:fs/promises";
import type { AgentTrainingConfig } from "../../config/schema.js";
import type { Data } from "../../data/sampler/data.js";
import { makeFolder, removeEmptyFolders } from "../../disk/folders.js";
import { notice, type TrainEvent } from "../../events.js";
import type { Native } from "../../native.js";
import { checkDevice, checkRanks, type Ranks } from "../../ranks/ranks.js";
import { findCheckpoint, removeUnfinished } from "../checkpoint/checkpoint.js";
import { lockFolder } from "../checkpoint/lock.js";
import { settleOldRun } from "../checkpoint/old-run.js";
import { checkOutputContent } from "../checkpoint/output-folder.js";
import { removeUnplaced } from "../checkpoint/publish.js";
import type { HeldOut } from "../eval/evaluate.js";
import { createEvaluation, type Evaluation } from "../eval/evaluation.js";
import { Generation } from "../eval/generation.js";
import { openData } from "./data.js";
import type { RowsFromCode } from "./dataset.js";
import { type Engine, openEngine } from "./engine.js";
import { checkHeldOutGiven, openHeldOut } from "./held-out.js";
import type { ModelFolder } from "./model.js";
import { cacheDir, mostImages } from "./options.js";
import { countSaves, expectedBatch } from "./plan.js";
import { checkDisk, checkOutputPlace, checkpointBytes } from "./preflight.js";
import type { Resources } from "./resources.js";
import { createRun, type Run, scheduleOf } from "./run.js";
import { openStart } from "./start.js";

/** A run that is ready to take its first step. */
export interface PreparedRun {
	data: Data;
	engine: Engine;
	run: Run;
	/** Null: no rows are held out. */
	evaluation: Evaluation | null;
}

export interface PrepareInput {
	native: Native;
	args: AgentTrainingConfig;
	code: RowsFromCode;
	signal: AbortSignal | null;
	resources: Resources;
	/** Those that train together. */
	ranks: Ranks;
}

/** Checks and opens everything. If it throws, nothing of the run is on the disk once `resources` are closed. */
export async function* prepareRun(input: PrepareInput): AsyncGenerator<TrainEvent, PreparedRun> {
	const { native, args, resources, ranks } = input;
	checkRanks(ranks, args);
	// A schedule's arguments can be wrong whatever the length of the run is.
	scheduleOf(args, 1_000_000);
	checkHeldOutGiven(args, input.code);
	yield* takeOutputFolder(native, args, resources);
	const { resume_from_checkpoint: resume, output_dir: outputDir } = args;
	const resumed = resume === null ? null : await findCheckpoint(resume, outputDir);
	const opened = yield* openStart(native, args, resumed, input.signal);
	resources.add(() => opened.vision?.close());
	checkDevice(ranks, { wanted: args.device, ...opened.device });
	const { data, rows, start } = yield* openData({ ...input, start: opened });
	const heldOut = yield* openHeldOut({ ...input, start, cut: rows.heldOut });
	const run = createRun(start, data, rows, heldOut?.data.source ?? null);
	const evaluation = heldOut && (await prepareEvaluation(input, heldOut, run, data.plan.totalSteps));
	for (const message of [evaluation?.notice, evaluation?.schedule?.notice])
		if (message) yield notice("warning", message);
	const evaluated = heldOut && { evalMaxTokens: heldOut.size.maxTokens, evalMaxSequences: heldOut.size.maxSequences };
	const trained = expectedBatch(start.args, data);
	const images = mostImages([trained, heldOut?.size ?? null, evaluation?.generation?.size ?? null]);
	const size = { ...trained, ...evaluated, ...evaluation?.generation?.size, ...images };
	const engine = yield* openEngine(start, size, native, resources, ranks);
	const room = await checkRoom(run, data, engine, start.model, evaluation !== null);
	yield { type: "check", name: "disk", message: room };
	resources.keep();
	return { data, engine, run, evaluation };
}

/** The evaluation of the run, with the prompts of the replies that it generates. */
async function prepareEvaluation(
	{ native, code }: PrepareInput,
	heldOut: HeldOut,
	{ args, resumed }: Run,
	totalSteps: number,
): Promise<Evaluation> {
	const { eval_generate: rows, per_device_eval_batch_size: batchSize } = args;
	const metric = code.evalMetric ?? null;
	const generation = rows > 0 ? await Generation.open({ native, heldOut, rows, batchSize, metric }) : null;
	return createEvaluation(args, heldOut, totalSteps, resumed?.state ?? null, generation, metric !== null);
}

/** Takes `output_dir` for this run, and cleans up after a killed run. */
async function* takeOutputFolder(
	native: Native,
	args: AgentTrainingConfig,
	resources: Resources,
): AsyncGenerator<TrainEvent, void> {
	const { output_dir: outputDir } = args;
	const found = await checkOutputPlace(outputDir);
	const { made, release } = await lockFolder(native, outputDir);
	// The folder can be removed only after the lock's file.
	if (made !== null) resources.addUndo(() => removeEmptyFolders(outputDir, made));
	resources.add(release);
	for (const path of [...(await removeUnfinished(outputDir)), ...(await removeUnplaced(outputDir))]) {
		yield { type: "removed", path, reason: "unfinished" };
	}
	const restored = await settleOldRun(outputDir);
	if (restored !== null) yield notice("warning", `a run ended before its first checkpoint. ${restored}`);
	await checkOutputContent(args);
	// From here on this run may set aside what another run left in the folder.
	resources.add(() => settleOldRun(outputDir));
	yield { type: "check", name: "output folder", message: found };
	if (args.cache_dir !== null) return;
	const cache = cacheDir(args);
	if ((await makeFolder(cache)) !== undefined) resources.addUndo(() => rm(cache, { recursive: true, force: true }));
}

/** Checks that the disk has room for the checkpoints of the run. */
function checkRoom(
	{ args, counters, saveInterval }: Run,
	{ plan }: Data,
	engine: Engine,
	model: ModelFolder,
	evaluates: boolean,
) {
	// A new checkpoint is complete before the oldest is removed; the best one stays in any case.
	const kept = (args.save_total_limit ?? Number.POSITIVE_INFINITY) + Number(evaluates);
	const most = kept + 1;
	const atOnce = Math.min(most, countSaves(args, plan, counters.step, saveInterval));
	return checkDisk(args.output_dir, checkpointBytes(engine.native.info(), model) * atOnce, atOnce);
}
