/** What a user sees of a run, and the file of its metrics. */
export { bytes, count, duration, jsonLine, measure, percent } from "./format.js";
export { MetricsFile, type MetricsLine } from "./metrics.js";
export { JsonReporter, type Reporter, TextReporter } from "./reporter.js";
