/** Lines of `metrics.jsonl` as sinks read them. */

/** The numbers of a line. */
export interface MetricsOfLine {
	step: number;
	/** By the names in the file; values that are not finite are left out. */
	values: [string, number][];
}

/** The numbers of a line; null: it is no line of metrics (a sample, or not JSON). */
export function metricsOfLine(line: string): MetricsOfLine | null {
	try {
		const { step, event, ...rest } = JSON.parse(line) as Record<string, unknown>;
		if (typeof step !== "number" || event !== undefined) return null;
		const values = Object.entries(rest).filter((entry): entry is [string, number] => typeof entry[1] === "number");
		return { step, values };
	} catch {
		return null;
	}
}

/** A metric's name as transformers' integrations write it: `train/loss`, `eval/loss`. */
export function tagOf(name: string): string {
	return name.startsWith("eval_") ? `eval/${name.slice("eval_".length)}` : `train/${name}`;
}
