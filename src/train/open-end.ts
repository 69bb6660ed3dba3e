/**
 * Training on rows whose number nobody knows: the plan takes them to be enough for the whole run, and when they end before,
 * the next epochs begin from the first row again, as if their number had been known from the start.
 */
import type { StepPlan } from "../data/batches.js";
import type { RowOrder } from "../data/order.js";
import type { AnySource } from "../data/source.js";
import { StreamRows } from "../data/stream.js";
import type { TokenFiller } from "../data/tokens.js";

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
export class OpenEnd {
	private settled = false;

	constructor(
		private readonly source: StreamRows,
		private readonly filler: TokenFiller,
		private readonly options: EndOptions,
	) {}

	/** Waits until it is known whether step `step` (from 0) is the last one of an epoch; then the plan that holds, if it is new. */
	async reachStep(step: number): Promise<Planned | null> {
		if (this.settled) return null;
		const { source, filler } = this;
		const { samplesOfStep, once, planFor } = this.options;
		const needed = Math.min(source.length, (step + 1) * samplesOfStep + (once ? 0 : 1)) - source.first;
		filler.reach(needed);
		while (source.ended === null && filler.taken < needed) {
			filler.check();
			await filler.progress();
		}
		if (source.ended === null || source.ended === source.length) return null;
		this.settled = true;
		return planFor(source.ended);
	}
}

/** The stream behind `source`, where its end is open. */
export function openStream(source: AnySource): StreamRows | null {
	return source instanceof StreamRows && source.open ? source : null;
}
