/** The rows of the highest loss, held-out or trained, as a line of `metrics.jsonl` names them. */

/** Those of one evaluation, or of an epoch that was trained. */
export interface HighestLosses {
	step: number;
	/** Of trained rows: the first step whose rows are counted. */
	firstStep: number | null;
	rows: {
		/** File and line. */
		location: string;
		source: string | null;
		/** In nats; null: it is not finite. */
		loss: number | null;
		targets: number;
	}[];
}

/** Rows that are kept, and characters of a place. */
const MOST_ROWS = 10;
const MOST_CHARACTERS = 300;

/** The rows of a line; null: it names none. What has another shape is left out. */
export function highestLossesOf(line: { step: number } & Record<string, unknown>): HighestLosses | null {
	const { step, first_step: first, highest_losses: given } = line;
	if (!Array.isArray(given)) return null;
	const rows: HighestLosses["rows"] = [];
	for (const one of given.slice(0, MOST_ROWS) as (Record<string, unknown> | null)[]) {
		const { location, source, loss, targets } = one ?? {};
		if (typeof location !== "string" || typeof targets !== "number") continue;
		rows.push({
			location: location.slice(-MOST_CHARACTERS),
			source: typeof source === "string" ? source.slice(0, MOST_CHARACTERS) : null,
			loss: typeof loss === "number" ? loss : null,
			targets,
		});
	}
	return rows.length === 0 ? null : { step, firstStep: typeof first === "number" ? first : null, rows };
}
