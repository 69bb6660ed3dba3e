/**
 * Training on rows whose number nobody knows: the plan takes them to be enough for the whole run, and when they end before,
 * the next epochs begin from the first row again, as if their number had been known from the start.
 */

import type { AnySource } from "../sources/source.js";
import { StreamRows } from "../sources/stream.js";
import type { TokenPrefetcher } from "../tokens/prefetch.js";
import type { StepPlan } from "./batches.js";
import type { RowOrder } from "./order.js";

/** What follows from the number of rows. */
export interface Planned {
	order: RowOrder;
	plan: StepPlan;
}

/** What the end of some rows means. */
export interface EndOptions {
	samplesOfStep: number;
	/** Whether they are trained once: then the run ends with them, and no step waits for a row of the next one. */
	once: boolean;
	planFor: (rows: number) => Planned;
}

/** The rows' open end. */
export class UnboundedStream {
	private settled = false;

	constructor(
		private readonly source: StreamRows,
		private readonly prefetcher: TokenPrefetcher,
		private readonly options: EndOptions,
	) {}

	/** Waits until it is known whether step `step` (from 0) is the last one of an epoch; then the plan that holds, if it is new. */
	async reachStep(step: number): Promise<Planned | null> {
		if (this.settled) return null;
		const { source, prefetcher } = this;
		const { samplesOfStep, once, planFor } = this.options;
		const needed = Math.min(source.length, (step + 1) * samplesOfStep + (once ? 0 : 1)) - source.first;
		prefetcher.reach(needed);
		while (source.ended === null && prefetcher.taken < needed) {
			prefetcher.check();
			await prefetcher.progress();
		}
		if (source.ended === null || source.ended === source.length) return null;
		this.settled = true;
		return planFor(source.ended);
	}
}

/** The stream behind `source`, where its end is open. */
export function streamOf(source: AnySource): StreamRows | null {
	return source instanceof StreamRows && source.open ? source : null;
}
