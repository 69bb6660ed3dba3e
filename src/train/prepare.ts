/**
 * Everything between options and the first step: checks, rows, the plan of steps, the engine, and the state to go on from.
 * Yields events as it goes. What it opens is closed by whoever holds `Resources`.
 */
import { rm, rmdir, stat } from "node:fs/promises";
import { basename } from "node:path";
import type { AgentTrainingConfig } from "../config/schema.js";
import { epochBatches, StepPlan } from "../data/batches.js";
import type { Dataset } from "../data/custom.js";
import type { RowOrder } from "../data/order.js";
import type { AnySource } from "../data/source.js";
import { TokenFiller } from "../data/tokens.js";
import { ArlError } from "../errors.js";
import type { ConvertRecordToData } from "../mongo/convert.js";
import type { MemoryPlan, Native, NativeEngine, NativeTokenCache } from "../native.js";
import { findCheckpoint, type Resumable, removeUnfinished } from "./checkpoint.js";
import type { TrainEvent } from "./events.js";
import type { RowKeeper } from "./keeper.js";
import { lockFolder } from "./lock.js";
import { type ModelFolder, readModelFolder } from "./model.js";
import { type BatchSize, cacheDir, engineOptions, stepInterval, textOptions } from "./options.js";
import {
	checkDisk,
	checkMemory,
	checkOutputFolder,
	checkpointBytes,
	checkpointsAtOnce,
	checkTokenizer,
	formatBytes,
	stopTokenWarning,
} from "./preflight.js";
import { detectShape, fillFirst, fillOrder, needsAllRows, openCache, openRows, orderOf } from "./rows.js";
import { createSchedule, type Schedule, warmupSteps } from "./schedules.js";
import { checkSameRun, differences, type Fingerprint, fixedOf, freeOf } from "./state.js";

/** Things to be closed, the newest first. */
export class Resources {
	private readonly closers: (() => Promise<void> | void)[] = [];

	add(close: () => Promise<void> | void): void {
		this.closers.push(close);
	}

	/** Closes all, even where one fails; the first failure is thrown. */
	async close(): Promise<void> {
		let failure: unknown = null;
		for (const close of this.closers.splice(0).reverse()) {
			try {
				await close();
			} catch (error) {
				failure ??= error;
			}
		}
		if (failure !== null) throw failure;
	}
}

/** A run that is ready to take its first step. */
export interface PreparedRun {
	args: AgentTrainingConfig;
	native: Native;
	model: ModelFolder;
	source: AnySource;
	/** Null: nobody needs to be told of checkpoints. */
	keeper: RowKeeper | null;
	shape: string;
	cache: NativeTokenCache;
	filler: TokenFiller;
	/** Nothing had to be encoded. */
	cached: boolean;
	order: RowOrder;
	plan: StepPlan;
	schedule: Schedule;
	engine: NativeEngine;
	memory: MemoryPlan;
	resumed: Resumable | null;
	fixed: Fingerprint;
	saveInterval: number;
	logInterval: number;
}

export interface PrepareInput {
	native: Native;
	args: AgentTrainingConfig;
	dataset: Dataset | null;
	/** A user's own way from a database's records to rows; absent: AgentRL's. */
	convert?: ConvertRecordToData | null;
	signal: AbortSignal | null;
	resources: Resources;
}

async function exists(path: string): Promise<boolean> {
	return stat(path).then(
		() => true,
		() => false,
	);
}

/** Removes the folders that checking has made, where it fails: then nothing is left of a run that never began. */
async function undoFolders(args: AgentTrainingConfig): Promise<() => Promise<void>> {
	const folder = cacheDir(args);
	const hadCache = args.cache_dir !== null || (await exists(folder));
	const hadOutput = await exists(args.output_dir);
	return async () => {
		if (!hadCache) await rm(folder, { recursive: true, force: true }).catch(() => {});
		// Only where it is empty: whatever else lies there is not this program's.
		if (!hadOutput) await rmdir(args.output_dir).catch(() => {});
	};
}

/** Checks and opens everything. Whatever it throws, nothing of the run is on the disk then. */
export async function* prepareRun(input: PrepareInput): AsyncGenerator<TrainEvent, PreparedRun> {
	const undo = await undoFolders(input.args);
	let ready = false;
	try {
		const run = yield* prepare(input);
		ready = true;
		return run;
	} finally {
		if (!ready) {
			await input.resources.close().catch(() => {});
			await undo();
		}
	}
}

async function* prepare(input: PrepareInput): AsyncGenerator<TrainEvent, PreparedRun> {
	const { native, args, dataset, convert = null, signal, resources } = input;
	// A schedule's arguments can be wrong whatever the length of the run is.
	createSchedule(scheduleOptions(args, 1_000_000));

	const model = await readModelFolder(args.model_name_or_path);
	// A config or an option that the engine refuses is told before rows are encoded.
	native.planMemory(engineOptions(args, { maxTokens: 1, maxSequences: 1 }));
	yield { type: "check", name: "model", message: `${model.modelType}, ${formatBytes(model.weightBytes)} of weights` };
	const folder = await checkOutputFolder(args);
	resources.add(await lockFolder(args.output_dir));
	yield { type: "check", name: "output folder", message: folder };
	for (const path of await removeUnfinished(args.output_dir)) yield { type: "removed", path, reason: "unfinished" };
	const resumed =
		args.resume_from_checkpoint === null ? null : await findCheckpoint(args.resume_from_checkpoint, args.output_dir);
	for (const message of resumed?.damaged ?? [])
		yield { type: "notice", level: "warning", message: `passed over: ${message}` };
	if (args.resume_from_checkpoint !== null && resumed === null) {
		const message = `no checkpoint stands in ${args.output_dir} yet: the run starts from the beginning`;
		yield { type: "notice", level: "warning", message };
	}

	const encoder = native.TextEncoder.open(textOptions(args, model.maxPositionEmbeddings));
	const text = encoder.info();
	yield { type: "check", name: "tokenizer", message: checkTokenizer(model, text) };

	const { source, entryRows, keeper } = await openRows({ native, args, dataset, convert, resumed, signal });
	resources.add(() => source.close());
	const { shape, firstRows } = await detectShape(source, encoder);
	const blank = source.blankLines > 0 ? `, ${source.blankLines} blank lines passed over` : "";
	yield { type: "check", name: "rows", message: `${source.length} rows of ${shape} in ${source.name}${blank}` };
	const warning = stopTokenWarning(encoder, text.stopIds, firstRows.slice(0, 8));
	if (warning !== null) yield { type: "notice", level: "warning", message: warning };

	const cache = await openCache(native, args, source, encoder, text);
	resources.add(() => cache.close());
	const early = needsAllRows(args) ? null : orderOf(args, source, entryRows, null);
	const next = resumed?.state.next ?? { epoch: 0, microBatch: 0 };
	const wanted = early
		? fillOrder(early, source.length, next.epoch, next.microBatch * args.per_device_train_batch_size)
		: Uint32Array.from({ length: source.length }, (_, row) => row);
	const filler = new TokenFiller({ source, cache, order: wanted });
	resources.add(() => filler.stop());
	// A run that ends with an error ends with what stands written down; that this fails too is no news then.
	resources.add(() => keeper?.release());
	const cached = filler.complete;
	if (!cached) yield* fillFirst(args, filler, keeper, signal);

	const lengths = cache.lengths();
	const order = early ?? orderOf(args, source, entryRows, lengths);
	if (order.rowsPerEpoch === 0) {
		throw new ArlError("ARL_DATA", `${source.name}: no row is left to train on`, "Look at what was left out, and why.");
	}
	checkFits(args, source, lengths);
	const plan = createPlan(args, order, cache);
	keeper?.check(plan);
	const schedule = createSchedule(scheduleOptions(args, plan.totalSteps));

	const identity = {
		model,
		dataIdentity: source.identity,
		rows: source.length,
		entryRows,
		databaseList: keeper?.id ?? null,
		textFingerprint: text.fingerprint,
		warmupSteps: warmupSteps(args.warmup_steps, plan.totalSteps),
		totalSteps: plan.totalSteps,
	};
	const fixed = fixedOf(args, identity);
	if (resumed) checkSameRun(resumed.path, resumed.state, fixed);

	const size = expectedBatch(args, order, plan, lengths, filler.complete);
	const options = engineOptions(args, size);
	const memory = native.planMemory(options);
	const device = native.devices().find((found) => found.device === args.device);
	yield { type: "check", name: "memory", message: checkMemory(memory, device) };
	const engine = await native.Engine.open(options);
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
		keeper,
		shape,
		cache,
		filler,
		cached,
		order,
		plan,
		schedule,
		engine,
		memory,
		resumed,
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

/** With packing, every sample has to fit into a micro-batch. */
function checkFits(args: AgentTrainingConfig, source: AnySource, lengths: Uint32Array): void {
	const bound = args.max_tokens_per_micro_batch;
	if (bound === null) return;
	const row = lengths.findIndex((length) => length > bound);
	if (row < 0) return;
	throw new ArlError(
		"ARL_DATA",
		`${source.location(row)}: the sample has ${lengths[row]} tokens, and max_tokens_per_micro_batch is ${bound}`,
		"Raise max_tokens_per_micro_batch, or set max_length and truncation.",
	);
}

function createPlan(args: AgentTrainingConfig, order: RowOrder, cache: NativeTokenCache): StepPlan {
	const maxTokens = args.max_tokens_per_micro_batch;
	const options = {
		batchSize: args.per_device_train_batch_size,
		...(maxTokens !== null && {
			packed: {
				maxTokens,
				pack: (rows: Uint32Array, bound: number) => cache.pack(rows, bound),
			},
		}),
	};
	const length = {
		maxSteps: args.max_steps,
		numTrainEpochs: args.num_train_epochs,
		gradientAccumulationSteps: args.gradient_accumulation_steps,
	};
	return new StepPlan((epoch) => epochBatches(order, epoch, options), length, maxTokens === null);
}

function countSaves(args: AgentTrainingConfig, plan: StepPlan, done: number, interval: number): number {
	const left = plan.totalSteps - done;
	if (args.save_strategy === "steps") return Math.max(1, Math.ceil(left / interval));
	const last = plan.place(plan.totalSteps - 1).epoch;
	return Math.max(1, last - plan.place(Math.min(done, plan.totalSteps - 1)).epoch + 1);
}

/** Rows times epochs up to which the largest micro-batch is found by looking at each one. */
const EXACT_WORK = 4_000_000;

/**
 * The largest micro-batch of the run: exact where all lengths are known and the run is not too long to look through, else
 * a bound from the longest rows. Where rows are still being encoded a larger one may come; then the engine plans anew.
 */
export function expectedBatch(
	args: AgentTrainingConfig,
	order: RowOrder,
	plan: StepPlan,
	lengths: Uint32Array,
	complete: boolean,
): BatchSize {
	const packed = args.max_tokens_per_micro_batch;
	const epochs = plan.place(plan.totalSteps - 1).epoch + 1;
	if (complete && order.rowsPerEpoch * epochs <= EXACT_WORK) {
		let maxTokens = 0;
		let maxSequences = 0;
		for (let step = 0; step < plan.totalSteps; step++) {
			for (const rows of plan.rows(step)) {
				let tokens = 0;
				for (const row of rows) tokens += lengths[row] ?? 0;
				maxTokens = Math.max(maxTokens, tokens);
				maxSequences = Math.max(maxSequences, rows.length);
			}
		}
		return { maxTokens, maxSequences };
	}
	const sorted = lengths.filter((length) => length > 0).sort();
	if (packed !== null) {
		let sequences = 0;
		for (let tokens = 0; sequences < sorted.length; sequences++) {
			tokens += sorted[sequences] as number;
			if (tokens > packed) break;
		}
		return { maxTokens: packed, maxSequences: Math.max(1, sequences) };
	}
	const count = Math.min(args.per_device_train_batch_size, order.rowsPerEpoch);
	const longest = sorted.slice(-count);
	const known = longest.reduce((sum, length) => sum + length, 0);
	// Before any row is encoded there is only the bound of the configuration to go by.
	const bound = args.max_length ?? 1024;
	return { maxTokens: known + (count - longest.length) * Math.min(bound, sorted.at(-1) ?? bound), maxSequences: count };
}

/** What a user may read of where the rows come from. */
export function sourceName(args: AgentTrainingConfig, source: AnySource): string {
	const oneFile = args.train_file.length === 1 && args.db_connection_string === null;
	return oneFile ? basename(args.train_file[0] ?? source.name) : source.name;
}

/** Options that differ from those of the earlier part of a run, and may. */
export function changedOptions(resumed: Resumable, args: AgentTrainingConfig): string[] {
	return differences(resumed.state.free, freeOf(args));
}
