/**
 * Rows on their way to the engine: encoded ahead of training, handed out a step at a time as micro-batches of tokens.
 * Knows no run and no engine, so that one run may have several: rows to train, held-out rows.
 */
import type { MicroBatch, NativeTokenCache } from "../../native.js";
import type { AnySource } from "../sources/source.js";
import { StreamRows } from "../sources/stream.js";
import { type Pictures, textBatch } from "../tokens/pictures.js";
import type { TokenPrefetcher } from "../tokens/prefetch.js";
import type { StepPlace, StepPlan } from "./batches.js";
import type { RowOrder } from "./order.js";

/** The order of the rows, and the steps that it is cut into. */
export interface Planned {
	order: RowOrder;
	plan: StepPlan;
}

/** A step's rows, encoded. */
export interface StepBatches {
	place: StepPlace;
	/** Row numbers of each micro-batch. */
	rows: Uint32Array[];
	batches: MicroBatch[];
}

/** How a run continues when its stream of rows ends. */
export interface StreamEnd {
	samplesOfStep: number;
	/** Each row is trained once: the run ends with the rows, and no step waits for a row of the next one. */
	once: boolean;
	/** Plans the run as if the stream had been known to have `rows` rows. */
	planFor: (rows: number) => Planned;
}

/** A step whose pixels are more bytes than this is not prepared ahead of its turn. */
const AHEAD_BYTES = 512 * 1024 * 1024;

/** The rows of a run, or of an evaluation. */
export class Data {
	private readonly stream: StreamRows | null;
	private settled = false;
	/** Steps whose images are prepared before their turn: one at most. */
	private readonly ahead = new Map<number, Promise<StepBatches | null>>();

	/** `shape`: of the rows: `messages`, `prompt/completion`, ... */
	constructor(
		readonly source: AnySource,
		readonly shape: string,
		readonly cache: NativeTokenCache,
		readonly prefetcher: TokenPrefetcher,
		private planned: Planned,
		private readonly end: StreamEnd,
		/** Null: no images are trained. */
		readonly pictures: Pictures | null = null,
	) {
		this.stream = streamOf(source);
	}

	get order(): RowOrder {
		return this.planned.order;
	}

	/** The steps. Of an unbounded stream: those of a stream that is long enough, until its end is known. */
	get plan(): StepPlan {
		return this.planned.plan;
	}

	/** Nobody knows how many rows there are: `source.length` is what the run needs at most. */
	get unbounded(): boolean {
		return this.stream !== null;
	}

	/**
	 * Waits for the rows of step `step` (from 0), and for their images; those of the step after it are prepared meanwhile. Null: the
	 * rows have ended, and the run with them.
	 */
	async step(step: number): Promise<StepBatches | null> {
		const asked = this.ahead.get(step) ?? this.gather(step);
		this.ahead.clear();
		const found = await asked;
		if (this.pictures === null || found === null || step + 1 >= this.plan.totalSteps) return found;
		// Rows that are followed are not taken before they are needed: other runs would miss them.
		if ((this.stream !== null && this.end.once) || pixelBytes(found.batches) > AHEAD_BYTES) return found;
		const next = this.gather(step + 1);
		// A failure surfaces in the call that asks for the step.
		next.catch(() => {});
		this.ahead.set(step + 1, next);
		return found;
	}

	private async gather(step: number): Promise<StepBatches | null> {
		if (this.stream !== null && !this.settled) await this.reach(this.stream, step);
		if (step >= this.plan.totalSteps) return null;
		await this.plan.prepare(step);
		const place = this.plan.place(step);
		const rows = this.plan.rows(step);
		for (const part of rows) await this.prefetcher.ready(part);
		const batches = rows.map((part) => this.cache.microBatch(part));
		return { place, rows, batches: (await this.pictures?.fill(batches)) ?? batches.map(textBatch) };
	}

	/**
	 * Waits until it is known whether the stream ends before step `step` or with it. If so, the steps are planned again: the next
	 * epochs begin from the first row, as if the number of rows had been known from the start.
	 */
	private async reach(source: StreamRows, step: number): Promise<void> {
		const { prefetcher, end } = this;
		const needed = Math.min(source.length, (step + 1) * end.samplesOfStep + (end.once ? 0 : 1)) - source.first;
		prefetcher.reach(needed);
		while (source.ended === null && prefetcher.taken < needed) {
			prefetcher.check();
			await prefetcher.progress();
		}
		if (source.ended === null || source.ended === source.length) return;
		this.settled = true;
		this.planned = end.planFor(source.ended);
	}
}

/** Bytes of the pixels of some micro-batches. */
function pixelBytes(batches: readonly MicroBatch[]): number {
	return batches.reduce((sum, { images = [] }) => sum + images.reduce((own, { pixels }) => own + pixels.length, 0), 0);
}

/** The stream behind `source`, if nobody knows its length. */
export function streamOf(source: AnySource): StreamRows | null {
	return source instanceof StreamRows && source.open ? source : null;
}
