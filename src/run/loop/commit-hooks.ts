/** Hooks from the training loop into a row source: run started, rows trained for good. Knows no concrete source. */
import { within } from "../../data/cancellation.js";
import type { StepPlan } from "../../data/sampler/batches.js";
import { notice, type TrainEvent } from "../../events.js";

/** What a row source does as a run proceeds. */
export interface CommitHooks {
	/** What a checkpoint must keep, so that a resumed run has the same rows. */
	readonly id: string;
	/** Throws if the rows may not be trained by this plan. Absent: by any plan. */
	check?(plan: StepPlan): void;
	/** The first step comes next. */
	begin(): Promise<void>;
	/** A checkpoint is about to be written. Rejects if its rows may not count as this run's. */
	beforeSave(): Promise<void>;
	/** The checkpoint after `step` steps is complete: begins to record its rows as trained. Calling it again changes nothing. */
	afterSave(plan: StepPlan, step: number): void;
	/** Resolves when all recording is done. Rejects if it failed. */
	flush(): Promise<void>;
	/** The run is over: waits for the recording in progress, whether it fails or not. */
	end(): Promise<void>;
	/** Notices for the user since the last call. */
	notices(): string[];
}

/** How long a notice may be delayed while the run waits. */
const NOTICE_MILLISECONDS = 500;

/** Waits for `wanted`, and reports the notices of `hooks` meanwhile: why it takes long. */
export async function* waitFor<T>(hooks: CommitHooks | null, wanted: Promise<T>): AsyncGenerator<TrainEvent, T> {
	if (hooks === null) return await wanted;
	const done = wanted.then(
		() => true,
		() => true,
	);
	for (let ended: boolean | undefined; !ended; ) {
		ended = await within(done, NOTICE_MILLISECONDS);
		for (const message of hooks.notices()) yield notice("warning", message);
	}
	return await wanted;
}

/**
 * Has the rows of all steps up to `step` recorded as trained for good, concurrently with training. Waits for the previous
 * recording first, and throws what that failed with.
 */
export async function* commit(
	hooks: CommitHooks | null,
	plan: StepPlan,
	step: number,
): AsyncGenerator<TrainEvent, void> {
	if (hooks === null) return;
	yield* flush(hooks);
	hooks.afterSave(plan, step);
}

/** Waits until all recording is done. */
export async function* flush(hooks: CommitHooks | null): AsyncGenerator<TrainEvent, void> {
	if (hooks !== null) yield* waitFor(hooks, hooks.flush());
}
