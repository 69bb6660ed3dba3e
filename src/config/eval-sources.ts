/** The entries of `eval_file`: the name under which each source's figures are reported, and its path. Reads no file. */
import { basename } from "node:path";

/** A source of held-out rows. */
export interface EvalSource {
	name: string;
	path: string;
}

const NAMED = /^([A-Za-z0-9_-]+)=(.+)$/s;

/** The sources that the entries name, in their order. An entry without a name has that of its file. */
export function evalSources(entries: readonly string[]): EvalSource[] {
	return entries.map((entry) => {
		const [, name, path] = NAMED.exec(entry) ?? [];
		return name !== undefined && path !== undefined ? { name, path } : { name: nameOf(entry), path: entry };
	});
}

/** `data/held out.jsonl.gz` is `held_out`. */
function nameOf(path: string): string {
	const stem =
		basename(path)
			.split(".")
			.find((part) => part !== "") ?? "";
	return stem.replaceAll(/[^A-Za-z0-9_-]+/g, "_") || "rows";
}

/** The figures of which the evaluation has one for all rows and one for each source. */
export const FIGURES = ["loss", "perplexity", "mean_token_accuracy", "entropy"] as const;

export type Figure = (typeof FIGURES)[number];

/** Whether more of a metric is better, where `greater_is_better` is none. */
export function greaterIsBetter(metric: string): boolean {
	return !/(loss|perplexity|entropy)$/.test(metric);
}

/** The name of a metric as the evaluation reports it. */
export function metricName(metric: string | null): `eval_${string}` {
	const name = metric ?? "loss";
	return name.startsWith("eval_") ? (name as `eval_${string}`) : `eval_${name}`;
}

/** Whether the options name held-out rows; code may give others. */
export function namesHeldOut(args: { eval_file: readonly string[]; eval_split: string | number | null }): boolean {
	return args.eval_file.length > 0 || args.eval_split !== null;
}
