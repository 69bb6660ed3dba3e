/**
 * Everything between options and the first step: checks, rows, the plan of steps, the engine, and the state to resume from.
 * Yields events as it goes. What it opens is closed by the caller, through `Resources`.
 */
import { rm } from "node:fs/promises";
import { basename } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { within } from "../../data/cancellation.js";
import type { StepPlan } from "../../data/sampler/batches.js";
import type { RowOrder } from "../../data/sampler/order.js";
import { streamOf, UnboundedStream } from "../../data/sampler/unbounded-stream.js";
import type { AnySource } from "../../data/sources/source.js";
import { TokenPrefetcher } from "../../data/tokens/prefetch.js";
import { chooseDevice } from "../../device/index.js";
import { makeFolder, removeEmptyFolders } from "../../disk/folders.js";
import { ArlError } from "../../errors.js";
import type { TrainEvent } from "../../events.js";
import type { Native, NativeTokenCache } from "../../native.js";
import { bytesToTenth } from "../../report/format.js";
import { findCheckpoint, type Resumable, removeUnfinished } from "../checkpoint/checkpoint.js";
import { lockFolder } from "../checkpoint/lock.js";
import { settleOldRun } from "../checkpoint/old-run.js";
import { checkOutputContent } from "../checkpoint/output-folder.js";
import { removeUnplaced } from "../checkpoint/publish.js";
import { bf16Of, checkSameRun, differences, type Fingerprint, fixedOf, freeOf } from "../checkpoint/state.js";
import type { CommitHooks } from "../loop/commit-hooks.js";
import { createSchedule, type Schedule, warmupSteps } from "../loop/schedules.js";
import { type OpenRows, type OpenRowsInput, openRows, type RowsFromCode } from "./dataset.js";
import { type OpenEngine, openEngine } from "./engine.js";
import type { ModelFolder } from "./model.js";
import {
	cacheDir,
	engineOptions,
	preprocessSeconds,
	type ResolvedConfig,
	resolveBf16,
	resolveForDevice,
	samplesOfStep,
	stepInterval,
} from "./options.js";
import { allRows, checkFits, countSaves, createPlan, expectedBatch, wantedRows } from "./plan.js";
import {
	checkDisk,
	checkOutputPlace,
	checkpointBytes,
	checkpointsAtOnce,
	checkTokenizer,
	stopTokenWarning,
} from "./preflight.js";
import type { Resources } from "./resources.js";
import { detectShape, needsAllRows, noteEvents, openCache, orderOf, prefetchFirst } from "./rows.js";
import { openRunModel } from "./run-model.js";

/** A run that is ready to take its first step. */
export interface PreparedRun extends OpenEngine {
	args: ResolvedConfig;
	native: Native;
	model: ModelFolder;
	source: AnySource;
	/** Null: nobody needs to be told of checkpoints. */
	hooks: CommitHooks | null;
	shape: string;
	cache: NativeTokenCache;
	prefetcher: TokenPrefetcher;
	/** Nothing had to be encoded. */
	cached: boolean;
	order: RowOrder;
	plan: StepPlan;
	schedule: Schedule;
	resumed: Resumable | null;
	/** Where nobody knows how many rows there are. */
	unbounded: UnboundedStream | null;
	datasetId: string | null;
	fixed: Fingerprint;
	saveInterval: number;
	logInterval: number;
}

export interface PrepareInput {
	native: Native;
	args: AgentTrainingConfig;
	code: RowsFromCode;
	signal: AbortSignal | null;
	resources: Resources;
}

/** Whether the run has begun: until then all that preparing has made on the disk is removed again. */
interface Progress {
	begun: boolean;
}

/** Takes `output_dir` for this run, and brings into order what a killed run has left there. */
async function* takeOutputFolder(
	{ native, args, resources }: PrepareInput,
	progress: Progress,
): AsyncGenerator<TrainEvent, void> {
	const { output_dir: outputDir } = args;
	const found = await checkOutputPlace(outputDir);
	const { made, release } = await lockFolder(native, outputDir);
	// The folder can go only when the lock's file is gone.
	if (made !== null) resources.add(() => progress.begun || removeEmptyFolders(outputDir, made));
	resources.add(release);
	for (const path of [...(await removeUnfinished(outputDir)), ...(await removeUnplaced(outputDir))]) {
		yield { type: "removed", path, reason: "unfinished" };
	}
	const restored = await settleOldRun(outputDir);
	if (restored !== null)
		yield { type: "notice", level: "warning", message: `a run ended before its first checkpoint. ${restored}` };
	await checkOutputContent(args);
	// From here on the folder may hold what another run has left, and this one has set aside.
	resources.add(() => settleOldRun(outputDir));
	yield { type: "check", name: "output folder", message: found };
	if (args.cache_dir !== null) return;
	const cache = cacheDir(args);
	if ((await makeFolder(cache)) === undefined) return;
	resources.add(() => progress.begun || rm(cache, { recursive: true, force: true }));
}

/** Checks and opens everything. Whatever it throws, nothing of the run is on the disk when `resources` are closed. */
export async function* prepareRun(input: PrepareInput): AsyncGenerator<TrainEvent, PreparedRun> {
	const progress = { begun: false };
	const run = yield* prepare(input, progress);
	progress.begun = true;
	return run;
}

async function* prepare(input: PrepareInput, progress: Progress): AsyncGenerator<TrainEvent, PreparedRun> {
	const { native, code, signal, resources } = input;
	// A schedule's arguments can be wrong whatever the length of the run is.
	createSchedule(scheduleOptions(input.args, 1_000_000));
	yield* takeOutputFolder(input, progress);

	const { resume_from_checkpoint: resume, output_dir: outputDir } = input.args;
	const resumed = resume === null ? null : await findCheckpoint(resume, outputDir);
	const openedModel = await openRunModel(input.args, resumed, native);
	const { model, chatTemplate } = openedModel;
	// A config or an option that the engine refuses is reported before rows are encoded.
	const chosen = chooseDevice(input.args.device, native);
	const { args, notices } = resolveForDevice(input.args, chosen.device);
	const smallest = engineOptions(args, chosen.device, { maxTokens: 1, maxSequences: 1 });
	chosen.native.planMemory({ ...smallest, modelDir: model.path });
	const weights = args.init_from_config ? "random weights" : `${bytesToTenth(model.weightBytes)} of weights`;
	yield { type: "check", name: "model", message: `${model.modelType}, ${weights}` };
	if (chosen.notice !== null) yield { type: "notice", level: "warning", message: chosen.notice };
	for (const message of notices) yield { type: "notice", level: "info", message };
	for (const message of openedModel.notices) yield { type: "notice", level: "warning", message };
	// A resumed run computes as it began, whatever the device is now.
	args.bf16 = !args.fp16 && resolveBf16(input.args.bf16, chosen.device, resumed && bf16Of(resumed.state.fixed));
	for (const message of resumed?.damaged ?? [])
		yield { type: "notice", level: "warning", message: `passed over: ${message}` };
	if (resume !== null && resumed === null) {
		const message = `there is no checkpoint in ${outputDir} yet: the run starts from the beginning`;
		yield { type: "notice", level: "warning", message };
	}

	const encoder = native.TextEncoder.open(openedModel.textOptions);
	const text = encoder.info();
	yield { type: "check", name: "tokenizer", message: checkTokenizer(model, text) };
	// Before rows are encoded, which may take long.
	if (resumed || !args.init_from_config) native.checkWeights(model.path);

	const known = resumed?.state.dataset ?? null;
	let ownCache: string | null = null;
	resources.add(() => progress.begun || ownCache === null || rm(ownCache, { recursive: true, force: true }));
	const opening = performance.now();
	const opened = yield* openTelling({ native, args, code, signal, datasetId: known, resumed });
	const openSeconds = (performance.now() - opening) / 1000;
	const { source, entryRows, datasetId, unverified, hooks } = opened;
	resources.add(() => source.close());
	for (const message of opened.notices) yield { type: "notice", level: "info", message };
	if (datasetId !== null && known === null) ownCache = opened.cacheFolder;
	const early = needsAllRows(args) ? null : orderOf(args, source, entryRows, null);
	const earlyPlan = early && createPlan(args, early, null);
	const next = resumed?.state.next ?? { epoch: 0, microBatch: 0 };
	await early?.prepare(next.epoch);
	const wanted = early ? wantedRows(args, source, early, earlyPlan, next) : allRows(source);
	const { shape, firstRows } = await detectShape(source, encoder, wanted, signal);
	yield { type: "check", name: "rows", message: rowsFound(source, shape) };
	const again = resumed && readAgain(opened, code, openSeconds);
	if (again) yield { type: "notice", level: "info", message: again };
	if (unverified) {
		const message = `${cacheDir(args)} does not tell what the earlier part of this run has read: a change of ${source.name} would go unnoticed`;
		yield { type: "notice", level: "warning", message };
	}
	if (args.images === "drop") {
		yield { type: "check", name: "images", message: "image parts are left out of the rows (images drop)" };
	}
	const warning = stopTokenWarning(encoder, text.stopIds, firstRows.slice(0, 8));
	if (warning !== null) yield { type: "notice", level: "warning", message: warning };

	const cache = await openCache(native, opened.cacheFolder, source, encoder, text);
	resources.add(() => cache.close());
	const prefetcher = new TokenPrefetcher({ source, cache, order: wanted });
	resources.add(() => prefetcher.stop());
	// What was begun to be written down is waited for, whether the run ends well or not.
	resources.add(() => hooks?.end());
	const cached = prefetcher.complete;
	const replayed =
		resumed && source.lazy?.inOrder
			? Math.min(wanted.length, resumed.state.step * samplesOfStep(args) - (source.lazy.first ?? 0))
			: 0;
	const seconds = preprocessSeconds(args, code.dataset !== null);
	if (cached) yield* noteEvents(prefetcher, true);
	else yield* prefetchFirst(args, prefetcher, { replayed, seconds, hooks, signal });
	if (replayed > 0) {
		const message = `${prefetcher.taken} rows of ${source.name} were read again in ${prefetcher.seconds.toFixed(1)} s to come to the place of the checkpoint`;
		yield { type: "notice", level: "info", message };
	}

	const lengths = cache.lengths();
	const order = early ?? orderOf(args, source, entryRows, lengths);
	if (order.rowsPerEpoch === 0) {
		throw new ArlError("ARL_DATA", `${source.name}: no row is left to train on`, "Look at what was left out, and why.");
	}
	checkFits(args, source, lengths);
	const plan = earlyPlan ?? createPlan(args, order, cache);
	hooks?.check(plan);
	const schedule = createSchedule(scheduleOptions(args, plan.totalSteps));

	const stream = streamOf(source);
	const planFor = (rows: number) => {
		const settled = orderOf(args, { length: rows }, [rows], null);
		// Rows that are followed are trained once: the run is over with them.
		const length = args.follow ? { ...args, max_steps: -1, num_train_epochs: 1 } : args;
		return { order: settled, plan: createPlan(length, settled, cache) };
	};
	const end = { samplesOfStep: samplesOfStep(args), once: args.follow, planFor };
	const identity = {
		model,
		dataIdentity: source.identity,
		rows: stream ? ("open" as const) : source.length,
		entryRows,
		databaseList: hooks?.id ?? null,
		textFingerprint: text.fingerprint,
		warmupSteps: warmupSteps(args.warmup_steps, plan.totalSteps),
		totalSteps: plan.totalSteps,
	};
	const fixed = fixedOf(args, identity);
	if (resumed) checkSameRun(resumed.path, resumed.state, fixed);

	const size = expectedBatch(args, order, plan, lengths, prefetcher.complete);
	const exported = { exportStopIds: text.stopIds, ...(chatTemplate !== null && { exportChatTemplate: chatTemplate }) };
	const open = yield* openEngine({ args, native, chosen, size, resumed, modelDir: model.path, exported });
	const { engine } = open;
	resources.add(() => engine.close());
	if (resumed) await engine.restoreState(resumed.stateDir);

	const saveInterval = stepInterval(args.save_steps, plan.totalSteps);
	const saves = args.save_strategy === "no" ? 1 : countSaves(args, plan, resumed?.state.step ?? 0, saveInterval);
	const atOnce = checkpointsAtOnce(args, saves);
	const needed = checkpointBytes(engine.info(), model) * atOnce;
	yield { type: "check", name: "disk", message: await checkDisk(args.output_dir, needed, atOnce) };

	return {
		args,
		native,
		model,
		source,
		hooks,
		shape,
		cache,
		prefetcher,
		cached,
		order,
		plan,
		schedule,
		...open,
		resumed,
		unbounded: stream && new UnboundedStream(stream, prefetcher, end),
		datasetId,
		fixed,
		saveInterval,
		logInterval: stepInterval(args.logging_steps, plan.totalSteps),
	};
}

function scheduleOptions(args: AgentTrainingConfig, totalSteps: number) {
	return {
		name: args.lr_scheduler_type,
		learningRate: args.learning_rate,
		warmupSteps: args.warmup_steps,
		totalSteps,
		kwargs: args.lr_scheduler_kwargs,
	};
}

const TOLD_EVERY_MILLISECONDS = 5000;

/** Opens the rows; where reading them first takes long, that is told. */
async function* openTelling(input: OpenRowsInput): AsyncGenerator<TrainEvent, OpenRows> {
	let rows = 0;
	const opening = openRows({ ...input, progress: (read) => (rows = read) });
	let opened: OpenRows | undefined;
	try {
		while (opened === undefined) {
			opened = await within(opening, TOLD_EVERY_MILLISECONDS);
			if (opened !== undefined || rows === 0) continue;
			const message = `${rows} rows from code are read so far; all of them must be known before the first step`;
			yield { type: "notice", level: "info", message };
		}
		return opened;
	} finally {
		// Whoever has left meanwhile closes nothing.
		if (opened === undefined) opening.then(({ source }) => source.close()).catch(() => {});
	}
}

/** What going on costs with rows of code; null: nothing, or it is told when it is known. */
function readAgain({ source, datasetId }: OpenRows, code: RowsFromCode, seconds: number): string | null {
	if (datasetId !== null) {
		if (source.lazy?.inOrder) return null;
		return `the rows of ${source.name} that are still to be trained are asked for again and compared; an identity of the data set spares that`;
	}
	if (code.convert === null && (code.dataset === null || "get" in code.dataset)) return null;
	return `${source.length} rows of ${source.name} were read again in ${seconds.toFixed(1)} s`;
}

function rowsFound(source: AnySource, shape: string): string {
	const blank = source.blankLines > 0 ? `, ${source.blankLines} blank lines passed over` : "";
	const left = source.leftOut ? `, ${source.leftOut} left out by the converting function` : "";
	const many = streamOf(source) ? `as many rows as come (${source.length} at most)` : `${source.length} rows`;
	return `${many} of ${shape} in ${source.name}${blank}${left}`;
}

/** What a user may read of where the rows come from. */
export function sourceName(args: AgentTrainingConfig, source: AnySource): string {
	const oneFile = args.train_file.length === 1 && args.db_connection_string === null && !source.lazy;
	return oneFile ? basename(args.train_file[0] ?? source.name) : source.name;
}

/** Options that differ from those of the earlier part of a run, and may. */
export function changedOptions(resumed: Resumable, args: AgentTrainingConfig): string[] {
	return differences(resumed.state.free, freeOf(args));
}
