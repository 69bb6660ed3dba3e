/** The rows that a model predicts worst. Keeps a bounded number of them, whatever the number of rows. */
import type { HighLoss } from "../../events.js";
import type { MicroBatchStats } from "../../native.js";

/** Rows that are named. */
export const MOST_ROWS = 10;

/**
 * The rows with the highest mean loss of those that were added, the highest first; of equal ones the one that was added first.
 * A loss that is not a number counts as the highest of all: it is why the figures over all rows are none.
 */
export class HighestLosses<Row extends { loss: number }> {
	readonly rows: Row[] = [];

	/** Adds the row of `describe`, which is called only where its `loss` is among the highest. */
	add(loss: number, describe: () => Row): void {
		const above = this.rows.findIndex((other) => isHigher(loss, other.loss));
		if (above < 0 && this.rows.length >= MOST_ROWS) return;
		this.rows.splice(above < 0 ? this.rows.length : above, 0, describe());
		if (this.rows.length > MOST_ROWS) this.rows.pop();
	}
}

/**
 * Those of an evaluation. Rows without a target have no loss. `byRow`: of each row of `source`, where it was evaluated. `parts`:
 * rows [first, end) of each origin.
 */
export function highestLosses(
	byRow: readonly (MicroBatchStats | undefined)[],
	source: { location(row: number): string },
	parts: readonly { name: string; first: number; end: number }[],
): HighLoss[] {
	const highest = new HighestLosses<{ row: number; loss: number; targets: number }>();
	for (const [row, stats] of byRow.entries()) {
		if (stats === undefined || !(stats.targetWeight > 0)) continue;
		const loss = stats.lossSum / stats.targetWeight;
		highest.add(loss, () => ({ row, loss, targets: stats.targetTokens }));
	}
	return highest.rows.map(({ row, loss, targets }) => {
		const part = parts.length > 1 ? parts.find(({ first, end }) => row >= first && row < end) : undefined;
		return { location: source.location(row), ...(part && { source: part.name }), loss, targets };
	});
}

function isHigher(a: number, b: number): boolean {
	return a > b || (Number.isNaN(a) && !Number.isNaN(b));
}
