/** A run, without its rows and engine: its options, progress and schedule, and what a resumed run must share with it. */
import { createHash } from "node:crypto";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { type Data, streamOf } from "../../data/sampler/data.js";
import type { AnySource } from "../../data/sources/source.js";
import type { BadRow } from "../../data/tokens/problems.js";
import type { Resumable } from "../checkpoint/checkpoint.js";
import { checkSameRun, type Fingerprint, fixedOf } from "../checkpoint/state.js";
import { metricScheduleOf } from "../eval/evaluation.js";
import type { CommitHooks } from "../loop/commit-hooks.js";
import { Counters } from "../loop/counters.js";
import { createSchedule, type Schedule, warmupSteps } from "../loop/schedules.js";
import type { OpenRows } from "./dataset.js";
import { type ResolvedConfig, stepInterval } from "./options.js";
import type { Start } from "./start.js";

export interface Run {
	args: ResolvedConfig;
	counters: Counters;
	schedule: Schedule;
	/** Steps between two checkpoints, and between two log lines. */
	saveInterval: number;
	logInterval: number;
	/** The checkpoint that the run resumes from. */
	resumed: Resumable | null;
	/** What a run that resumes from this one must share with it. */
	fixed: Fingerprint;
	/** By which such a run identifies its rows; null: by their content. */
	datasetId: string | null;
	/** Null: no source needs to know how the run proceeds. */
	hooks: CommitHooks | null;
}

/** Creates the run. Throws `ARL_STATE` if it is not the one that it should resume. */
export function createRun(
	{ args, model, text, resumed }: Start,
	{ source, plan, prefetcher }: Data,
	{ entryRows, datasetId, hooks }: OpenRows,
	heldOut: AnySource | null,
): Run {
	const { totalSteps } = plan;
	const schedule = scheduleOf(args, totalSteps);
	const fixed = fixedOf(args, {
		model,
		dataIdentity: source.identity,
		rows: streamOf(source) ? "open" : source.length,
		entryRows,
		databaseList: hooks?.id ?? null,
		textFingerprint: text.fingerprint,
		warmupSteps: warmupSteps(args.warmup_steps, totalSteps),
		totalSteps,
		badImages: args.images === "train" ? badImagesOf(prefetcher.bad) : null,
		heldOut: heldOut?.identity ?? null,
		evalInterval: stepInterval(args.eval_steps ?? args.logging_steps, totalSteps),
	});
	if (resumed) checkSameRun(resumed.path, resumed.state, fixed);
	return {
		args,
		counters: new Counters(resumed?.state),
		schedule,
		saveInterval: stepInterval(args.save_steps, totalSteps),
		logInterval: stepInterval(args.logging_steps, totalSteps),
		resumed,
		fixed,
		datasetId,
		hooks,
	};
}

/** A hash of the rows that are left out because of their images; null: there are none. */
function badImagesOf(bad: readonly BadRow[]): string | null {
	const rows = bad.filter(({ reason }) => reason === "image").map(({ row }) => row);
	if (rows.length === 0) return null;
	const sorted = Uint32Array.from(rows).sort();
	return `${rows.length} (${createHash("sha256").update(sorted).digest("hex").slice(0, 8)})`;
}

/**
 * The learning rates of a run of `totalSteps` steps; of a schedule that follows evaluations, that before the first one. Throws
 * `ARL_CONFIG` if the options are wrong.
 */
export function scheduleOf(args: AgentTrainingConfig, totalSteps: number): Schedule {
	const following = metricScheduleOf(args);
	if (following !== null) return () => following.rate;
	return createSchedule({
		name: args.lr_scheduler_type,
		learningRate: args.learning_rate,
		warmupSteps: args.warmup_steps,
		totalSteps,
		kwargs: args.lr_scheduler_kwargs,
	});
}
