/**
 * Optimizer steps on the engine: each is submitted, if possible while the step before is in progress, and finished. The error
 * for a step that fails says what to do, and where its batch is kept.
 */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Data, StepBatches } from "../../data/sampler/data.js";
import type { AnySource } from "../../data/sources/source.js";
import { makeFolder } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";
import type { EngineInfo, MicroBatch, StepStats } from "../../native.js";
import { listCheckpoints } from "../checkpoint/checkpoint.js";
import type { Engine } from "../setup/engine.js";
import { withPlan } from "../setup/memory.js";
import type { ResolvedConfig } from "../setup/options.js";

/** A step whose gradients are computed behind the step in progress. It changes nothing until it is finished. */
export interface SubmittedStep {
	/** From 1. */
	step: number;
	rows: StepBatches;
	learningRate: number;
	ticket: Promise<number>;
}

/** The steps of a run one after the other, so that a GPU never waits for the loop. */
export class StepQueue {
	/** The rows of the next step; null: all steps are done. */
	private next: Promise<StepBatches | null> | null = null;
	private ahead: Promise<SubmittedStep | null> | null = null;
	private over = false;
	/** Steps that were withdrawn. */
	private withdrawn = 0;

	/** Begins with the step after `done` steps. */
	constructor(
		private readonly engine: Engine,
		private readonly data: Data,
		private readonly args: Pick<ResolvedConfig, "fp16" | "max_grad_norm" | "output_dir">,
		done: number,
	) {
		this.prepare(done);
	}

	/** Starts to put the rows of the step after `done` steps together. */
	prepare(done: number): void {
		this.next = done < this.data.plan.totalSteps ? this.data.step(done) : null;
		// A failure surfaces where the loop waits for the rows.
		this.next?.catch(() => {});
	}

	/** The rows of the next step, null where they have ended. Null at once: all steps are done. */
	get rows(): Promise<StepBatches | null> | null {
		return this.next;
	}

	/** Step `step` (from 1), submitted now unless it was submitted before. */
	async take(step: number, rows: StepBatches, learningRate: number): Promise<SubmittedStep> {
		const submitted = await this.ahead;
		this.ahead = null;
		return submitted ?? this.submit(step, rows, learningRate);
	}

	/** Submits the next step behind `current`, which is being finished, as soon as its rows are encoded. */
	follow(current: SubmittedStep, learningRate: number): void {
		const { next } = this;
		if (next === null) return;
		const { withdrawn } = this;
		const submit = (rows: StepBatches | null) =>
			this.over || rows === null || withdrawn !== this.withdrawn
				? null
				: this.submit(current.step + 1, rows, learningRate);
		// The engine holds one submitted step, so that the call that finishes `current` must come first.
		this.ahead = current.ticket.then(() => next).then(submit);
		this.ahead.catch(() => {});
	}

	private submit(step: number, rows: StepBatches, learningRate: number): SubmittedStep {
		const ticket = this.engine.native.submitStep(rows.batches, { learningRate, maxGradNorm: this.args.max_grad_norm });
		// The error surfaces in `finish()`.
		ticket.catch(() => {});
		return { step, rows, learningRate, ticket };
	}

	/** Takes a submitted step. Throws `ARL_NONFINITE` where its loss or gradient is not finite and it was not skipped. */
	async finish(submitted: SubmittedStep): Promise<StepStats> {
		const { engine, args } = this;
		let stats: StepStats;
		try {
			stats = await engine.native.finishStep(await submitted.ticket);
		} catch (error) {
			const known = toArlError(error);
			if (known.code === "ARL_OOM") throw await outOfMemory(engine, submitted, args.output_dir, known);
			if (known.code !== "ARL_NONFINITE") throw known;
			const range = " float16 holds no number above 65504: --fp16 false --bf16 has the range of float32.";
			throw await this.nonFinite(submitted, known.message.replace(/^step \d+: /, ""), args.fp16 ? range : "");
		}
		if (stats.skipped) return stats;
		if (!Number.isFinite(stats.loss)) throw await this.nonFinite(submitted, `the loss is ${stats.loss}`);
		if (!Number.isFinite(stats.gradNorm))
			throw await this.nonFinite(submitted, `the gradient's norm is ${stats.gradNorm}`);
		return stats;
	}

	/** Gives up the step that was submitted and not finished: the engine is needed for something else. `take` submits it again. */
	async withdraw(): Promise<void> {
		this.withdrawn += 1;
		const { ahead } = this;
		this.ahead = null;
		if (ahead !== null) await this.engine.native.discardStep();
	}

	/** Gives up the step that was submitted and not finished, and takes no other. Doing so again has no effect. */
	async end(): Promise<void> {
		this.over = true;
		await this.withdraw();
	}

	/** The error for a loss or gradient that is not finite. Keeps the batch in `output_dir`. */
	private async nonFinite(submitted: SubmittedStep, what: string, hint = ""): Promise<ArlError> {
		const { output_dir: outputDir } = this.args;
		const path = join(outputDir, `nonfinite-step-${submitted.step}.json`);
		let saved = `The batch is in ${path}.`;
		try {
			await makeFolder(outputDir);
			await writeFile(path, `${JSON.stringify(contentOf(submitted, what, this.data.source))}\n`);
		} catch (error) {
			saved = `The batch could not be written to ${path}: ${toArlError(error).message}.`;
		}
		const last = (await listCheckpoints(outputDir)).at(-1);
		const where = last ? ` The last checkpoint is ${last.path}.` : "";
		return new ArlError(
			"ARL_NONFINITE",
			`step ${submitted.step}: ${what}`,
			`${saved}${where} Look at its rows, lower learning_rate, add warmup_steps, or set max_grad_norm.${hint}`,
		);
	}
}

/** A step's batch, for people: the place of each row, its tokens and its targets. */
function contentOf({ step, learningRate, rows: { rows, batches } }: SubmittedStep, reason: string, source: AnySource) {
	const microBatches = batches.map(({ inputIds, targets, cuSeqlens }, i) =>
		Array.from(rows[i] as Uint32Array, (row, j) => {
			const [from, to] = [cuSeqlens[j] as number, cuSeqlens[j + 1] as number];
			return {
				location: source.location(row),
				row,
				input_ids: Array.from(inputIds.subarray(from, to)),
				targets: Array.from(targets.subarray(from, to)),
			};
		}),
	);
	return { step, reason, learning_rate: learningRate, micro_batches: microBatches };
}

/** The error of an engine out of memory, with the plan for these very micro-batches, and what remains of the run. */
async function outOfMemory(engine: Engine, { step, rows }: SubmittedStep, outputDir: string, error: ArlError) {
	const { maxTokens, maxSequences } = engine.options;
	const tokens = rows.batches.map(({ inputIds }) => inputIds.length);
	const sequences = rows.batches.map(({ cuSeqlens }) => cuSeqlens.length - 1);
	const size = { maxTokens: Math.max(maxTokens, ...tokens), maxSequences: Math.max(maxSequences, ...sequences) };
	const options = { ...engine.options, ...size };
	const last = (await listCheckpoints(outputDir)).at(-1);
	const left = last
		? `The last checkpoint is whole: resume from it with --resume_from_checkpoint ${last.path}`
		: "There is no checkpoint yet.";
	return withPlan(error, engine.plan(options), () => engine.advise(options), `step ${step}: `, left);
}

/** Model FLOPs of a step: each token through all matrices, and attention over its own sequence. */
export function flopsOf(batches: MicroBatch[], { flopsPerToken, attentionFlops }: EngineInfo): number {
	let flops = 0;
	for (const { inputIds, cuSeqlens } of batches) {
		flops += inputIds.length * flopsPerToken;
		for (let i = 1; i < cuSeqlens.length; i++) {
			const length = (cuSeqlens[i] as number) - (cuSeqlens[i - 1] as number);
			flops += attentionFlops * length * length;
		}
	}
	return flops;
}
