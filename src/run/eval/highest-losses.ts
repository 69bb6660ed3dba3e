/** The held-out rows that a model predicts worst. Keeps a bounded number of them, whatever the number of rows. */
import type { HighLoss } from "../../events.js";
import type { MicroBatchStats } from "../../native.js";

/** Rows that an evaluation names. */
export const MOST_ROWS = 10;

/**
 * The rows with the highest mean loss, the highest first; of equal ones the first row. A loss that is not a number counts as the
 * highest of all: it is why the figures of the evaluation are none. Rows without a target have no loss. `byRow`: of each row of
 * `source`, where it was evaluated. `parts`: rows [first, end) of each origin.
 */
export function highestLosses(
	byRow: readonly (MicroBatchStats | undefined)[],
	source: { location(row: number): string },
	parts: readonly { name: string; first: number; end: number }[],
): HighLoss[] {
	const kept: { row: number; loss: number; targets: number }[] = [];
	for (const [row, stats] of byRow.entries()) {
		if (stats === undefined || !(stats.targetWeight > 0)) continue;
		const loss = stats.lossSum / stats.targetWeight;
		const above = kept.findIndex((other) => isHigher(loss, other.loss));
		if (above < 0 && kept.length >= MOST_ROWS) continue;
		kept.splice(above < 0 ? kept.length : above, 0, { row, loss, targets: stats.targetTokens });
		if (kept.length > MOST_ROWS) kept.pop();
	}
	return kept.map(({ row, loss, targets }) => {
		const part = parts.length > 1 ? parts.find(({ first, end }) => row >= first && row < end) : undefined;
		return { location: source.location(row), ...(part && { source: part.name }), loss, targets };
	});
}

function isHigher(a: number, b: number): boolean {
	return a > b || (Number.isNaN(a) && !Number.isNaN(b));
}
