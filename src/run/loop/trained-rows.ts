/** The rows that a run predicted worst when it trained them: those of the epoch in progress. */
import type { StepBatches } from "../../data/sampler/data.js";
import type { HighLoss, StepEvent, TrainedRowsEvent } from "../../events.js";
import type { MicroBatch, StepStats } from "../../native.js";
import { HighestLosses } from "../eval/highest-losses.js";

/** The target of a position that is not trained. */
const IGNORED = -100;

/** Collects the rows of the highest loss, an epoch at a time. */
export class TrainedRows {
	private highest = new HighestLosses<HighLoss>();
	private firstStep: number | null = null;
	private reported = true;

	constructor(private readonly source: { location(row: number): string }) {}

	/** Adds the rows of step `step` (from 1). */
	add(step: number, { rows, batches }: StepBatches, { sequenceLosses }: Pick<StepStats, "sequenceLosses">): void {
		this.firstStep ??= step;
		this.reported = false;
		for (const [i, batch] of batches.entries()) {
			for (const [j, row] of (rows[i] as Uint32Array).entries()) {
				const { targets, weight } = targetsOf(batch, j);
				if (!(weight > 0)) continue;
				const loss = (sequenceLosses[i]?.[j] as number) / weight;
				this.highest.add(loss, () => ({ location: this.source.location(row), loss, targets }));
			}
		}
	}

	/** The rows since the epoch began, after the step `last`; nothing where no step was added since the last report. */
	*report({ step, epoch }: StepEvent): Generator<TrainedRowsEvent, void> {
		if (this.reported || this.firstStep === null) return;
		this.reported = true;
		yield { type: "trained_rows", step, epoch, firstStep: this.firstStep, highestLosses: [...this.highest.rows] };
	}

	/** Begins with the next epoch. */
	endEpoch(): void {
		this.highest = new HighestLosses();
		this.firstStep = null;
		this.reported = true;
	}
}

/** The targets of positive weight of a sequence, and the sum of their weights. */
function targetsOf({ targets, weights, cuSeqlens }: MicroBatch, sequence: number) {
	const sum = { targets: 0, weight: 0 };
	for (let t = cuSeqlens[sequence] as number; t < (cuSeqlens[sequence + 1] as number); t++) {
		const weight = targets[t] === IGNORED ? 0 : (weights?.[t] ?? 1);
		if (weight > 0) sum.targets += 1;
		sum.weight += weight;
	}
	return sum;
}
