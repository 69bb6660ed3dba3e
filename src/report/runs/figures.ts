/** What the metrics of a run come to: the values that people compare, exact over all lines. */
import type { Extent, MetricsTable, Point } from "./table.js";

/** The course of one metric. */
export interface Course {
	first: Point;
	last: Point;
	/** The lowest of a loss, the highest of other metrics of quality. */
	best: Point;
}

export interface Figures {
	/** Of the last line. */
	step: number;
	epoch: number;
	/** Of the whole run, resumed parts included. */
	tokens: number;
	targetTokens: number;
	seconds: number;
	tokensPerSecond: number;
	/** Seconds in which steps waited for rows. */
	waitingSeconds: number;
	/** The most resident memory of the process at a logged step. */
	peakRssBytes: number;
	/** Of training: `loss` and `mean_token_accuracy`. */
	training: Record<string, Course>;
	/** Of evaluation, by the names in `metrics.jsonl`: `eval_loss`, ... */
	evaluation: Record<string, Course>;
}

/** Metrics of training whose course is worth a figure. */
const COURSES = ["loss", "mean_token_accuracy"];

/** Times and sizes of an evaluation, of which none is the best. */
const NOT_QUALITY = /(_runtime|_per_second|_seconds|_samples|_tokens|_rows)$/;

/** Whether lower is better: losses, and what grows with them. */
export function lowerIsBetter(name: string): boolean {
	return /loss|perplexity|entropy|grad_norm|error/.test(name);
}

/** The figures of a run with at least one line of metrics; null: it has none. */
export function figuresOf(training: MetricsTable, evaluation: MetricsTable): Figures | null {
	if (training.empty) return null;
	const last = (name: string) => training.extent(name)?.last.value ?? 0;
	const seconds = last("elapsed_seconds");
	const tokens = last("num_tokens");
	return {
		step: Math.max(...training.names.map((name) => training.extent(name)?.last.step ?? 0)),
		epoch: last("epoch"),
		tokens,
		targetTokens: last("num_target_tokens"),
		seconds,
		tokensPerSecond: seconds > 0 ? tokens / seconds : 0,
		waitingSeconds: training.extent("data_seconds")?.sum ?? 0,
		peakRssBytes: training.extent("rss_bytes")?.highest.value ?? 0,
		training: courses(training, COURSES),
		evaluation: courses(
			evaluation,
			evaluation.names.filter((name) => name.startsWith("eval_") && !NOT_QUALITY.test(name)),
		),
	};
}

function courses(table: MetricsTable, names: readonly string[]): Record<string, Course> {
	const known = names.flatMap((name): [string, Course][] => {
		const extent = table.extent(name);
		return extent === undefined ? [] : [[name, course(name, extent)]];
	});
	return Object.fromEntries(known);
}

function course(name: string, { first, last, lowest, highest }: Extent): Course {
	return { first, last, best: lowerIsBetter(name) ? lowest : highest };
}
