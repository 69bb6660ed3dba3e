/**
 * Training on rows whose number nobody knows: the plan takes them to be enough for the whole run, and when they end before,
 * the next epochs begin from the first row again, as if their number had been known from the start.
 */
import type { StepPlan } from "../data/batches.js";
import type { RowOrder } from "../data/order.js";
import type { AnySource } from "../data/source.js";
import { StreamRows } from "../data/stream.js";
import type { TokenFiller } from "../data/tokens.js";
import { TextOnlySource } from "../images/drop.js";

/** What follows from the number of rows. */
export interface Planned {
	order: RowOrder;
	plan: StepPlan;
}

/** The rows' open end. */
export class OpenEnd {
	private settled = false;

	constructor(
		private readonly source: StreamRows,
		private readonly filler: TokenFiller,
		private readonly samplesOfStep: number,
		private readonly planFor: (rows: number) => Planned,
	) {}

	/** Waits until it is known whether step `step` (from 0) is the last one of an epoch; then the plan that holds, if it is new. */
	async reachStep(step: number): Promise<Planned | null> {
		if (this.settled) return null;
		const needed = Math.min(this.source.length, (step + 1) * this.samplesOfStep + 1);
		this.filler.reach(needed);
		while (this.source.ended === null && this.filler.taken < needed) {
			this.filler.check();
			await this.filler.progress();
		}
		if (this.source.ended === null || this.source.ended === this.source.length) return null;
		this.settled = true;
		return this.planFor(this.source.ended);
	}
}

/** The stream behind `source`, where its end is open. */
export function openStream(source: AnySource): StreamRows | null {
	const stream = source instanceof TextOnlySource ? source.inner : source;
	return stream instanceof StreamRows && stream.open ? stream : null;
}
