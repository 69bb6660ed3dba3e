/** The saves of a run: when one is due, the checkpoint, the removal of older ones, and the model in `output_dir`. */
import { epochAfter, type StepPlace } from "../../data/sampler/batches.js";
import type { SavedEvent, TrainEvent } from "../../events.js";
import { listCheckpoints, removeCheckpoint, saveCheckpoint } from "../checkpoint/checkpoint.js";
import { removeOldRun } from "../checkpoint/old-run.js";
import { publishCheckpoint, publishEngine, publishMerged } from "../checkpoint/publish.js";
import { freeOf, type TrainerState } from "../checkpoint/state.js";
import type { PreparedRun } from "../setup/prepare.js";
import { commit, waitFor } from "./commit-hooks.js";

export class Saves {
	/** The newest checkpoint. */
	private last: { step: number; path: string } | null;

	constructor(private readonly prepared: PreparedRun) {
		const { resumed } = prepared.run;
		this.last = resumed && { step: resumed.state.step, path: resumed.path };
	}

	/** Why a checkpoint is due after this step; null: none is. */
	dueAfter(step: number, place: StepPlace): SavedEvent["reason"] | null {
		const { data, run } = this.prepared;
		const { save_strategy: strategy } = run.args;
		if (strategy === "no") return null;
		if (step === data.plan.totalSteps) return "end";
		if (strategy === "epoch") return place.lastOfEpoch ? "epoch" : null;
		return step % run.saveInterval === 0 ? "steps" : null;
	}

	/** Writes a checkpoint. Returns its path. */
	async *save(reason: SavedEvent["reason"]): AsyncGenerator<TrainEvent, string> {
		const { data, engine, run } = this.prepared;
		const { args, hooks } = run;
		const { step } = run.counters;
		const started = performance.now();
		data.prefetcher.sync();
		if (hooks) yield* waitFor(hooks, hooks.beforeSave());
		const { path, bytes } = await saveCheckpoint(engine.saving, args.output_dir, this.state());
		this.last = { step, path };
		const replaced = await removeOldRun(args.output_dir);
		yield { type: "saved", step, path, bytes, seconds: (performance.now() - started) / 1000, reason };
		if (replaced !== null) yield { type: "removed", path: replaced, reason: "replaced" };
		yield* commit(hooks, data.plan, step);
		if (args.save_total_limit === null) return path;
		const all = await listCheckpoints(args.output_dir);
		const others = all.filter((checkpoint) => checkpoint.step !== step);
		for (const checkpoint of others.slice(0, Math.max(0, all.length - args.save_total_limit))) {
			await removeCheckpoint(checkpoint);
			yield { type: "removed", path: checkpoint.path, reason: "save_total_limit" };
		}
		return path;
	}

	/** Saves the last step, if it is not saved. Returns the folder of the model: `output_dir` after all steps; null: none. */
	async *finish(completed: boolean): AsyncGenerator<TrainEvent, string | null> {
		const { data, engine, run } = this.prepared;
		const { args, counters, hooks } = run;
		let saved = this.last?.step === counters.step ? this.last.path : null;
		if (!completed) {
			// Even with save_strategy no, so that a stopped run can be resumed.
			return saved === null && counters.step > 0 ? yield* this.save("interrupted") : saved;
		}
		if (saved === null && args.save_strategy !== "no") saved = yield* this.save("end");
		if (saved !== null) await publishCheckpoint(saved, args.output_dir);
		else {
			if (hooks) yield* waitFor(hooks, hooks.beforeSave());
			await publishEngine(engine.saving, args.output_dir);
			const replaced = await removeOldRun(args.output_dir);
			if (replaced !== null) yield { type: "removed", path: replaced, reason: "replaced" };
			yield* commit(hooks, data.plan, counters.step);
		}
		if (args.merge_adapter) await publishMerged(engine.merge, args.output_dir);
		return args.output_dir;
	}

	/** What a checkpoint keeps of the run. */
	private state(): TrainerState {
		const { data, run } = this.prepared;
		const { step, ...sums } = run.counters;
		const last = data.plan.place(step - 1);
		return {
			version: 1,
			step,
			totalSteps: data.plan.totalSteps,
			epoch: epochAfter(last),
			next: last.lastOfEpoch ? { epoch: last.epoch + 1, microBatch: 0 } : { epoch: last.epoch, microBatch: last.end },
			...sums,
			...(run.datasetId !== null && { dataset: run.datasetId }),
			fixed: run.fixed,
			free: freeOf(run.args),
		};
	}
}
