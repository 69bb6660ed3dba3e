/**
 * One optimizer step: its rows as micro-batches, submitted to the engine and finished there, and what is kept where its loss or
 * gradient is not finite.
 */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { StepPlace } from "../../data/sampler/batches.js";
import { makeFolder } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";
import type { MicroBatch, StepStats } from "../../native.js";
import { listCheckpoints } from "../checkpoint/checkpoint.js";
import { withPlan } from "../setup/memory.js";
import type { PreparedRun } from "../setup/prepare.js";

/** A step's rows, encoded. */
export interface PreparedStep {
	place: StepPlace;
	rows: Uint32Array[];
	batches: MicroBatch[];
}

/** Waits for the rows of step `step` (from 0). Null: the rows have ended, and the run with them. */
export async function prepareStep(run: PreparedRun, step: number): Promise<PreparedStep | null> {
	const planned = await run.unbounded?.reachStep(step);
	if (planned) Object.assign(run, planned);
	if (step >= run.plan.totalSteps) return null;
	await run.plan.prepare(step);
	const place = run.plan.place(step);
	const rows = run.plan.rows(step);
	for (const part of rows) await run.prefetcher.ready(part);
	return { place, rows, batches: rows.map((part) => run.cache.microBatch(part)) };
}

/** Model FLOPs of a step: each token through all matrices, and attention over its own sequence. */
export function flopsOf(run: PreparedRun, batches: MicroBatch[]): number {
	const { flopsPerToken, attentionFlops } = run.engine.info();
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

/** Keeps the batch that made a loss or gradient that is not finite, and tells where. */
async function nonFinite(
	run: PreparedRun,
	step: number,
	prepared: PreparedStep,
	{ learningRate, what, hint = "" }: { learningRate: number; what: string; hint?: string },
): Promise<ArlError> {
	const { args, source } = run;
	const path = join(args.output_dir, `nonfinite-step-${step}.json`);
	const microBatches = prepared.rows.map((rows, i) => {
		const { inputIds, targets, cuSeqlens } = prepared.batches[i] as MicroBatch;
		return Array.from(rows, (row, j) => {
			const [from, to] = [cuSeqlens[j] as number, cuSeqlens[j + 1] as number];
			return {
				location: source.location(row),
				row,
				input_ids: Array.from(inputIds.subarray(from, to)),
				targets: Array.from(targets.subarray(from, to)),
			};
		});
	});
	const content = { step, reason: what, learning_rate: learningRate, micro_batches: microBatches };
	let saved = `The batch is in ${path}.`;
	try {
		await makeFolder(args.output_dir);
		await writeFile(path, `${JSON.stringify(content)}\n`);
	} catch (error) {
		saved = `The batch could not be written to ${path}: ${toArlError(error).message}.`;
	}
	const last = (await listCheckpoints(args.output_dir)).at(-1);
	const where = last ? ` The last checkpoint is ${last.path}.` : "";
	return new ArlError(
		"ARL_NONFINITE",
		`step ${step}: ${what}`,
		`${saved}${where} Look at its rows, lower learning_rate, add warmup_steps, or set max_grad_norm.${hint}`,
	);
}

/** An engine out of memory: the plan for these very micro-batches, and what is left of the run. */
async function outOfMemory(run: PreparedRun, step: number, { batches }: PreparedStep, error: ArlError) {
	const most = (planned: number, sizes: number[]) => Math.max(planned, ...sizes);
	const { engineOptions: planned, args } = run;
	const tokens = batches.map(({ inputIds }) => inputIds.length);
	const sequences = batches.map(({ cuSeqlens }) => cuSeqlens.length - 1);
	const options = {
		...planned,
		maxTokens: most(planned.maxTokens, tokens),
		maxSequences: most(planned.maxSequences, sequences),
	};
	const last = (await listCheckpoints(args.output_dir)).at(-1);
	const left = last
		? `The last checkpoint is whole: resume from it with --resume_from_checkpoint ${last.path}`
		: "There is no checkpoint yet.";
	const plan = run.native.planMemory(options);
	return withPlan(error, plan, () => run.advise(options), `step ${step}: `, left);
}

/** A step whose gradients are computed behind the step in progress. It changes nothing until it is finished. */
export interface SubmittedStep {
	step: number;
	prepared: PreparedStep;
	learningRate: number;
	ticket: Promise<number>;
}

function submitStep(run: PreparedRun, step: number, prepared: PreparedStep, learningRate: number): SubmittedStep {
	const hyper = { learningRate, maxGradNorm: run.args.max_grad_norm };
	const ticket = run.engine.submitStep(prepared.batches, hyper);
	// Who finishes the step is told of it.
	ticket.catch(() => {});
	return { step, prepared, learningRate, ticket };
}

/** Takes a submitted step. Throws `ARL_NONFINITE` where its loss or gradient is not finite and it was not skipped. */
export async function finishStep(run: PreparedRun, submitted: SubmittedStep): Promise<StepStats> {
	const { step, prepared, learningRate, ticket } = submitted;
	let stats: StepStats;
	try {
		stats = await run.engine.finishStep(await ticket);
	} catch (error) {
		const known = toArlError(error);
		if (known.code === "ARL_NONFINITE") {
			const hint = run.args.fp16
				? " float16 holds no number above 65504: --fp16 false --bf16 has the range of float32."
				: "";
			throw await nonFinite(run, step, prepared, { learningRate, what: known.message, hint });
		}
		throw known.code === "ARL_OOM" ? await outOfMemory(run, step, prepared, known) : known;
	}
	if (stats.skipped) return stats;
	for (const [name, value] of [
		["the loss", stats.loss],
		["the gradient's norm", stats.gradNorm],
	] as const) {
		if (!Number.isFinite(value))
			throw await nonFinite(run, step, prepared, { learningRate, what: `${name} is ${value}` });
	}
	return stats;
}

/** Submits steps, where possible one ahead of the step in progress, so that a GPU never waits for the loop. */
export class StepSubmitter {
	private ahead: Promise<SubmittedStep | null> | null = null;
	private over = false;

	constructor(private readonly run: PreparedRun) {}

	/** Step `step` (from 1), if it was not submitted before. */
	async take(step: number, prepared: PreparedStep, learningRate: number): Promise<SubmittedStep> {
		const submitted = await this.ahead;
		this.ahead = null;
		return submitted ?? submitStep(this.run, step, prepared, learningRate);
	}

	/** Submits the step behind `current`, which is being finished, as soon as its rows are there. */
	follow(current: SubmittedStep, next: Promise<PreparedStep | null>, learningRate: number): void {
		const submit = (prepared: PreparedStep | null) =>
			this.over || prepared === null ? null : submitStep(this.run, current.step + 1, prepared, learningRate);
		// The engine holds one submitted step, so that the call that finishes `current` must go before.
		this.ahead = current.ticket.then(() => next).then(submit);
		// Rows that cannot be had are told of when they are waited for.
		this.ahead.catch(() => {});
	}

	/** Gives up the step that was submitted and not finished. Doing so again has no effect. */
	async end(): Promise<void> {
		this.over = true;
		const { ahead } = this;
		this.ahead = null;
		if (ahead !== null) await this.run.engine.discardStep();
	}
}
