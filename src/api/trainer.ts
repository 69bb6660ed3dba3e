/** The trainer: options and rows in, events or a result out. */
import { shownOptions } from "../config/print.js";
import type { AgentTrainingConfig, AgentTrainingConfigInput } from "../config/schema.js";
import type { ConvertRecordToData } from "../data/sources/convert.js";
import { checkDataset, type Dataset } from "../data/sources/custom.js";
import type { RecordData } from "../data/sources/record.js";
import { ArlError, toArlError, userError } from "../errors.js";
import { type EndEvent, type EvaluationMetrics, type EventOf, notice, type TrainEvent } from "../events.js";
import { launchOf } from "../launch/launch.js";
import { loadNative, type Native } from "../native.js";
import { ALONE, type Ranks } from "../ranks/ranks.js";
import { MetricsSink } from "../report/metrics.js";
import { RunRecorder } from "../report/runs/recorder.js";
import { Sinks } from "../report/sinks/sinks.js";
import type { EvalMetric } from "../run/eval/generation.js";
import { trainLoop } from "../run/loop/loop.js";
import { Requests } from "../run/loop/requests.js";
import type { RowsFromCode } from "../run/setup/dataset.js";
import { fetchNamed } from "../run/setup/fetch.js";
import { hasHeldOut } from "../run/setup/held-out.js";
import { resolveArgs } from "../run/setup/options.js";
import { type PreparedRun, type PrepareInput, prepareRun } from "../run/setup/prepare.js";
import { Resources } from "../run/setup/resources.js";
import { loadCode } from "../run/setup/user-modules.js";

/** What a callback can do to the run. */
export interface TrainerControl {
	/** Ends the run after the current step, with a checkpoint. */
	stop(): void;
	/** Saves a checkpoint after the current step, whatever `save_strategy` says. */
	save(): void;
	/** Evaluates the held-out rows after the current step, whatever `eval_strategy` says. */
	evaluate(): void;
}

/** Functions that are called, and awaited, as a run proceeds. An error in one of them ends the run with `ARL_USER`. */
export interface TrainerCallback {
	onEvent?(event: TrainEvent, control: TrainerControl): void | Promise<void>;
	onStart?(event: EventOf<"start">, control: TrainerControl): void | Promise<void>;
	onStep?(event: EventOf<"step">, control: TrainerControl): void | Promise<void>;
	onEvaluate?(event: EventOf<"evaluate">, control: TrainerControl): void | Promise<void>;
	onSample?(event: EventOf<"sample">, control: TrainerControl): void | Promise<void>;
	onLog?(event: EventOf<"log">, control: TrainerControl): void | Promise<void>;
	onEpoch?(event: EventOf<"epoch">, control: TrainerControl): void | Promise<void>;
	onSave?(event: EventOf<"saved">, control: TrainerControl): void | Promise<void>;
	onEnd?(event: EventOf<"end">, control: TrainerControl): void | Promise<void>;
}

interface TrainerOptions {
	/** Only null, as in AgentRL: the trainer loads the model that `args.model_name_or_path` names. */
	model?: null;
	args: AgentTrainingConfigInput;
	callbacks?: TrainerCallback[];
}

/** Rows that need no converting. */
interface ReadyRows {
	/** Rows in place of those of `args.train_file`, or after them. A resumed run needs the same rows again. */
	train_dataset?: Dataset<RecordData>;
	/** Held-out rows, after those of `args.eval_file`. All are read before the first step. */
	eval_dataset?: Dataset<RecordData>;
	/** A metric of the replies that `args.eval_generate` generates. */
	eval_metric?: EvalMetric<RecordData>;
	convert_record_to_data_func?: undefined;
}

/** Rows that a function converts. */
interface RawRows<Row> {
	/** Raw rows. */
	train_dataset?: Dataset<Row>;
	/** Held-out raw rows, after those of `args.eval_file`. */
	eval_dataset?: Dataset<Row>;
	/** A metric of the replies that `args.eval_generate` generates, of the rows as they are converted. */
	eval_metric?: EvalMetric<RecordData>;
	/** Converts each raw row, of files as of `train_dataset` and `eval_dataset`. */
	convert_record_to_data_func: ConvertRecordToData<Row>;
}

export type QwenTrainerOptions<Row = unknown> = TrainerOptions & (ReadyRows | RawRows<Row>);

export interface RunOptions {
	/** Aborting it ends the run after the current step, with a checkpoint. */
	signal?: AbortSignal;
}

/** How a run ended. */
export type TrainResult = Omit<EndEvent, "type">;

/** The callback for each type of event that has one. */
const CALLBACKS = {
	start: "onStart",
	step: "onStep",
	log: "onLog",
	evaluate: "onEvaluate",
	sample: "onSample",
	epoch: "onEpoch",
	saved: "onSave",
	end: "onEnd",
} as const;

async function call(callback: TrainerCallback, event: TrainEvent, control: TrainerControl): Promise<void> {
	const own = event.type in CALLBACKS ? [CALLBACKS[event.type as keyof typeof CALLBACKS]] : [];
	for (const name of ["onEvent", ...own] as const) {
		try {
			await callback[name]?.(event as never, control);
		} catch (error) {
			throw userError(`the callback ${name}`, error);
		}
	}
}

/** Events, each after `report` has had it; what that returns comes before. */
async function* reported<Result>(
	events: AsyncGenerator<TrainEvent, Result>,
	report: (event: TrainEvent) => Promise<TrainEvent[]>,
): AsyncGenerator<TrainEvent, Result> {
	try {
		for (;;) {
			const next = await events.next();
			if (next.done) return next.value;
			yield* await report(next.value);
			yield next.value;
		}
	} finally {
		await events.return(undefined as never);
	}
}

/** Fetches what the options name on the Hugging Face Hub, and prepares the run with it. */
async function* prepareNamed(input: PrepareInput): AsyncGenerator<TrainEvent, PreparedRun> {
	const { args, signal } = input;
	return yield* prepareRun({ ...input, args: yield* fetchNamed(args, !args.init_from_config, signal) });
}

/** What a trainer runs on that is not given by its options: the native part, and the ranks that train with it. */
interface Ground {
	core: () => Native;
	ranks: Ranks;
}

const grounds = new WeakMap<object, Ground>();

/** A trainer for `arl train`, which opens ranks, and on another native part, for tests and benchmarks. Not part of the public API. */
export function createTrainer<Row>(
	options: QwenTrainerOptions<Row>,
	core: () => Native = loadNative,
	ranks: Ranks = ALONE,
): QwenTrainer<Row> {
	const trainer = new QwenTrainer(options);
	grounds.set(trainer, { core, ranks });
	return trainer;
}

/** One rank. Programs of users' own are started by a launcher like any other, and each would train by itself. */
function aloneHere(): Ground {
	const { world, launcher } = launchOf(process.env);
	if (world === 1) return { core: loadNative, ranks: ALONE };
	throw new ArlError(
		"ARL_DEVICE",
		`${world} ranks were started by ${launcher}: QwenTrainer trains with one`,
		"Start `arl train` on the ranks; rows from code are given to it with --dataset.",
	);
}

/** Fine-tunes a Qwen model on rows. One trainer is one run. */
export class QwenTrainer<Row = unknown> {
	/** The options with every value resolved. */
	readonly args: AgentTrainingConfig;
	private readonly notices: string[];
	private readonly code: RowsFromCode;
	private readonly callbacks: TrainerCallback[];
	private started = false;
	/** Of the run in progress. */
	private requests: Requests | null = null;

	constructor(options: QwenTrainerOptions<Row>) {
		if (options.model !== undefined && options.model !== null) {
			throw new ArlError(
				"ARL_CONFIG",
				"model: only null is allowed",
				"Name the model's folder in args.model_name_or_path.",
			);
		}
		const { args, notices } = resolveArgs(options.args, options.train_dataset !== undefined);
		this.args = args;
		this.notices = notices;
		const { train_dataset: dataset, eval_dataset: evalDataset, convert_record_to_data_func: convert } = options;
		if (dataset !== undefined) checkDataset(dataset);
		if (evalDataset !== undefined) checkDataset(evalDataset, "eval_dataset");
		if (convert !== undefined && typeof convert !== "function")
			throw new ArlError("ARL_CONFIG", "convert_record_to_data_func: expected a function of a row");
		const { eval_metric: evalMetric = null } = options;
		if (evalMetric !== null && typeof evalMetric !== "function")
			throw new ArlError("ARL_CONFIG", "eval_metric: expected a function of a row and a reply");
		if (evalMetric !== null && args.eval_generate === 0)
			throw new ArlError("ARL_CONFIG", "eval_metric is a metric of generated replies", "Set args.eval_generate.");
		this.code = { dataset: dataset ?? null, convert: convert ?? null, evalDataset: evalDataset ?? null, evalMetric };
		this.callbacks = options.callbacks ?? [];
	}

	/**
	 * Runs, and yields events. Leaving the loop early ends the run without saving; to save, abort `signal` and read on.
	 *
	 * @throws ArlError from the iterator, if the run fails.
	 */
	async *run(options: RunOptions = {}): AsyncGenerator<TrainEvent, void> {
		if (this.started)
			throw new ArlError("ARL_CONFIG", "this trainer has run already", "Create another QwenTrainer for another run.");
		this.started = true;
		const requests = new Requests(options.signal ?? null);
		this.requests = requests;
		const control: TrainerControl = {
			stop: () => requests.stop(),
			save: () => requests.save(),
			evaluate: () => this.heldOut(requests).evaluate(),
		};
		const resources = new Resources();
		let failure: ArlError | null = null;
		try {
			for await (const event of this.events(requests, resources)) {
				for (const callback of this.callbacks) await call(callback, event, control);
				yield event;
			}
		} catch (error) {
			failure = toArlError(error);
		} finally {
			this.requests = null;
			// Nobody evaluates any more.
			requests.takeEvaluations()?.(null);
			// Throws the failure, or, also to a reader who has left, a failure to close.
			await resources.close(failure);
		}
	}

	/**
	 * Runs to the end.
	 *
	 * @throws ArlError `ARL_INTERRUPTED` if the signal ended it, after saving.
	 */
	async train(options: RunOptions = {}): Promise<TrainResult> {
		let result: TrainResult | null = null;
		for await (const event of this.run(options)) {
			if (event.type === "end") {
				const { type: _, ...rest } = event;
				result = rest;
			}
		}
		if (result === null) throw new ArlError("ARL_INTERNAL", "the run ended without its last event");
		if (result.outcome === "interrupted") {
			throw new ArlError(
				"ARL_INTERRUPTED",
				`interrupted after step ${result.steps} of ${result.totalSteps}`,
				result.modelPath === null ? "" : `Resume with resume_from_checkpoint: ${result.modelPath}`,
			);
		}
		return result;
	}

	/** Ends the run in progress after the current step, with a checkpoint. */
	stop(): void {
		this.running().stop();
	}

	/** Saves a checkpoint of the run in progress after the current step, whatever `save_strategy` says. */
	save(): void {
		this.running().save();
	}

	/**
	 * Evaluates the held-out rows of the run in progress after the current step, whatever `eval_strategy` says. A callback does
	 * not await it: the run waits for its callbacks.
	 *
	 * @throws ArlError `ARL_INTERRUPTED` if the run ends before.
	 */
	evaluate(): Promise<EvaluationMetrics> {
		const requests = this.heldOut(this.running());
		return new Promise((resolve, reject) => {
			requests.evaluate((metrics) => {
				if (metrics !== null) resolve(metrics);
				else reject(new ArlError("ARL_INTERRUPTED", "the run ended before the held-out rows were evaluated"));
			});
		});
	}

	/** Throws `ARL_CONFIG` where there is nothing to evaluate. */
	private heldOut(requests: Requests): Requests {
		if (hasHeldOut(this.args, this.code)) return requests;
		throw new ArlError("ARL_CONFIG", "evaluate(): no held-out rows are given", "Name them in args.eval_file.");
	}

	private running(): Requests {
		if (this.requests !== null) return this.requests;
		throw new ArlError("ARL_CONFIG", "this trainer has no run in progress", "Call run() or train() first.");
	}

	private async *events(requests: Requests, resources: Resources): AsyncGenerator<TrainEvent, void> {
		const { args } = this;
		for (const message of this.notices) yield notice("info", message);
		const { core, ranks } = grounds.get(this) ?? aloneHere();
		const native = core();
		const code = await loadCode(args, this.code);
		const metrics = new MetricsSink(args);
		const shown = shownOptions(args);
		const recorder = new RunRecorder({ outputDir: args.output_dir, name: args.run_name, options: shown });
		const sinks = await Sinks.open({ args, shown });
		resources.add(() => sinks.close());
		const report = async (event: TrainEvent) => {
			metrics.event(event);
			const notices = [...recorder.event(event), ...sinks.event(event)];
			return event.type === "end" ? [...notices, ...(await sinks.finish(event.outcome))] : notices;
		};
		const preparing = prepareNamed({ native, args, code, signal: requests.signal, resources, ranks });
		const run = yield* reported(preparing, report);
		resources.add(() => metrics.close());
		resources.add(() => recorder.close());
		try {
			yield* reported(trainLoop(run, requests, resources), report);
		} catch (error) {
			recorder.failed(toArlError(error));
			await sinks.failed(toArlError(error));
			throw error;
		}
	}
}
