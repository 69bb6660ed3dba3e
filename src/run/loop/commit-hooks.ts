/**
 * A place that rows come from and that is told how the run goes: when it begins, when its rows are trained for good, and while
 * it is waited for the user is told. Knows no such place.
 */
import type { StepPlan } from "../../data/sampler/batches.js";
import type { TrainEvent } from "../../events.js";

/** A place that rows come from and that is told how the run goes. */
export interface CommitHooks {
	/** What a checkpoint must keep, for the run that goes on from it to have the same rows. */
	readonly id: string;
	/** Throws where it may not be trained by this plan. */
	check(plan: StepPlan): void;
	/** The first step comes next. */
	begin(): Promise<void>;
	/** A checkpoint is about to be written. Rejects where its rows may not count as this run's. */
	beforeSave(): Promise<void>;
	/** A checkpoint after `step` steps stands: begins to write down what that means. Telling it again changes nothing. */
	afterSave(plan: StepPlan, step: number): void;
	/** All that was begun is done. Rejects with what it failed with. */
	flush(): Promise<void>;
	/** The run is over: waits for what was begun, whether it fails or not, and from then on waits for nothing. */
	end(): Promise<void>;
	/** What there is to tell the user since this was called last. */
	notices(): string[];
}

/** How long something that the user should know may wait while the run does. */
const NOTICE_MILLISECONDS = 500;

/** Waits for `wanted`, and meanwhile tells what `hooks` has to tell: that it is waited for. */
export async function* waitFor<T>(hooks: CommitHooks | null, wanted: Promise<T>): AsyncGenerator<TrainEvent, T> {
	if (hooks === null) return await wanted;
	const done = wanted.then(
		() => true,
		() => true,
	);
	for (let ended = false; !ended; ) {
		let timer: NodeJS.Timeout | undefined;
		const pause = new Promise<boolean>((resolve) => {
			timer = setTimeout(resolve, NOTICE_MILLISECONDS, false);
		});
		ended = await Promise.race([done, pause]);
		clearTimeout(timer);
		for (const message of hooks.notices()) yield { type: "notice", level: "warning", message };
	}
	return await wanted;
}

/**
 * Has it written down that the rows of all steps up to `step` are trained for good. It goes on beside training; the last time is
 * waited for first, and a failure of it thrown.
 */
export async function* commit(
	hooks: CommitHooks | null,
	plan: StepPlan,
	step: number,
): AsyncGenerator<TrainEvent, void> {
	if (hooks === null) return;
	yield* settle(hooks);
	hooks.afterSave(plan, step);
}

/** Waits until all that was to be written down is. */
export async function* settle(hooks: CommitHooks | null): AsyncGenerator<TrainEvent, void> {
	if (hooks !== null) yield* waitFor(hooks, hooks.flush());
}
