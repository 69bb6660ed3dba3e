/** The saves of a run: when one is due, the checkpoint, the removal of older ones, and the model in `output_dir`. */
import { dirname } from "node:path";
import { epochAfter, type StepPlace } from "../../data/sampler/batches.js";
import { notice, type SavedEvent, type TrainEvent } from "../../events.js";
import { listCheckpoints, removeCheckpoint, saveCheckpoint } from "../checkpoint/checkpoint.js";
import { BEST_LINK, LATEST_LINK, setLink } from "../checkpoint/links.js";
import { removeOldRun } from "../checkpoint/old-run.js";
import { publishCheckpoint, publishEngine, publishMerged } from "../checkpoint/publish.js";
import { freeOf, type TrainerState } from "../checkpoint/state.js";
import type { Scored } from "../eval/best.js";
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
		if (strategy === "best") return this.prepared.evaluation?.tracker.improvedAt(step) ? "best" : null;
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
		this.prepared.evaluation?.tracker.saving(step);
		const { path, bytes } = await saveCheckpoint(engine.saving, args.output_dir, this.state());
		this.last = { step, path };
		await this.link();
		const replaced = await removeOldRun(args.output_dir);
		yield { type: "saved", step, path, bytes, seconds: (performance.now() - started) / 1000, reason };
		if (replaced !== null) yield { type: "removed", path: replaced, reason: "replaced" };
		yield* commit(hooks, data.plan, step);
		if (args.save_total_limit === null) return path;
		const all = await listCheckpoints(args.output_dir);
		const others = all.filter((checkpoint) => checkpoint.step !== step && checkpoint.step !== this.best?.step);
		for (const checkpoint of others.slice(0, Math.max(0, all.length - args.save_total_limit))) {
			await removeCheckpoint(checkpoint);
			yield { type: "removed", path: checkpoint.path, reason: "save_total_limit" };
		}
		return path;
	}

	/** The evaluation of the best checkpoint; null: there is none. */
	private get best(): Scored | null {
		return this.prepared.evaluation?.tracker.state.checkpoint ?? null;
	}

	/** The folder of the best checkpoint; null: there is none. A resumed run may have left it in another `output_dir`. */
	private async bestPath(): Promise<string | null> {
		const { best } = this;
		const { args, resumed } = this.prepared.run;
		if (best === null) return null;
		const folders = [args.output_dir, ...(resumed ? [dirname(resumed.path)] : [])];
		for (const folder of folders) {
			const found = (await listCheckpoints(folder)).find(({ step }) => step === best.step);
			if (found !== undefined) return found.path;
		}
		return null;
	}

	/** Points `best` and `latest` at the checkpoints of this run. */
	async link(): Promise<void> {
		const { output_dir: outputDir } = this.prepared.run.args;
		const all = await listCheckpoints(outputDir);
		const best = all.find(({ step }) => step === this.best?.step);
		await setLink(outputDir, LATEST_LINK, all.at(-1)?.path ?? null);
		await setLink(outputDir, BEST_LINK, best?.path ?? null);
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
		const saves = args.save_strategy === "steps" || args.save_strategy === "epoch";
		if (saved === null && saves) saved = yield* this.save("end");
		const best = args.load_best_model_at_end ? await this.bestPath() : null;
		if (best !== null && best !== saved) {
			yield notice("info", `the model in ${args.output_dir} is the best one, that of ${best}`);
			saved = best;
		}
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
		const { data, evaluation, run } = this.prepared;
		const { step, ...sums } = run.counters;
		const last = data.plan.place(step - 1);
		return {
			version: 1,
			step,
			totalSteps: data.plan.totalSteps,
			epoch: epochAfter(last),
			next: last.lastOfEpoch ? { epoch: last.epoch + 1, microBatch: 0 } : { epoch: last.epoch, microBatch: last.end },
			...sums,
			...(evaluation && { evaluation: evaluation.tracker.state }),
			...(evaluation?.schedule && { schedule: evaluation.schedule.state }),
			...(run.datasetId !== null && { dataset: run.datasetId }),
			fixed: run.fixed,
			free: freeOf(run.args),
		};
	}
}
