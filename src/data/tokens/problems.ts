/** Rows that cannot be used: counted by reason, and shown with file and line. */
import { ArlError } from "../../errors.js";

/** One row that cannot be used. */
export interface BadRow {
	row: number;
	/** Where a person finds it: `train.jsonl:17`. */
	location: string;
	/** Stable and short: `not json`, `no messages`, ... */
	reason: string;
	message: string;
	/** What to do about it, other than to correct the row. */
	hint?: string;
}

const SHOWN = 5;

/** Number of rows by reason, the most frequent first. */
export function countReasons(rows: BadRow[]): Record<string, number> {
	const counts = new Map<string, number>();
	for (const { reason } of rows) counts.set(reason, (counts.get(reason) ?? 0) + 1);
	return Object.fromEntries([...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)));
}

/** The error for bad rows, of `checked` rows in all. */
export function badRowsError(rows: BadRow[], checked: number): ArlError {
	const sorted = [...rows].sort((a, b) => a.row - b.row);
	const lines = sorted.slice(0, SHOWN).map(({ location, reason, message }) => `${location}: ${reason}: ${message}`);
	const hints = new Set(["Correct the rows, or leave such rows out with --on_bad_row skip."]);
	for (const { reason, message, hint } of sorted) {
		if (hint !== undefined && hint !== "") hints.add(hint);
		// No option leaves out videos and sounds.
		if (reason === "image" && message.includes("image") && hint === undefined)
			hints.add("Leave only the image parts out, and train on the text, with --images drop.");
	}
	const hint = [...hints].slice(0, SHOWN).join("\n");
	const [only] = lines;
	if (sorted.length === 1 && only) return new ArlError("ARL_DATA", only, hint);
	const counts = Object.entries(countReasons(rows)).map(([reason, count]) => `${count} ${reason}`);
	const more = sorted.length > SHOWN ? [`... and ${sorted.length - SHOWN} more`] : [];
	return new ArlError(
		"ARL_DATA",
		[`${sorted.length} of ${checked} rows cannot be used (${counts.join(", ")})`, ...lines, ...more].join("\n"),
		hint,
	);
}
