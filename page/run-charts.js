// Which curves of a run are drawn, and how.
import { hue } from "./charts.js";
import { bytes, count, known, measure, percent, rate } from "./elements.js";

/** Steps between the marks of an axis of bytes. */
const BINARY = Array.from({ length: 32 }, (_, i) => 2 ** (10 + i));

/** A number on an axis. */
export const short = (value) => String(Number(value.toPrecision(4)));

/** A metric of `curves` as a line of a chart; null where they do not have it. */
export const line = (name, curves, metric, more = {}) => {
	const curve = curves.metrics[metric];
	return curve === undefined ? null : { name, steps: curves.steps, ...curve, color: hue(0), ...more };
};

/** The metrics of evaluation by figure: `eval_web_loss` is the loss of the source `web` where there is an `eval_loss`. */
function evaluatedFigures({ evaluated }) {
	const names = evaluated.map(({ name }) => name.slice("eval_".length));
	const figures = new Map();
	for (const rest of names) {
		const base = names.filter((other) => rest.endsWith(`_${other}`)).sort((a, b) => b.length - a.length)[0];
		const figure = base ?? rest;
		const source = base === undefined ? null : rest.slice(0, -base.length - 1);
		figures.set(figure, [...(figures.get(figure) ?? []), { metric: `eval_${rest}`, source }]);
	}
	return figures;
}

export function runCharts(run) {
	const { training, evaluation, start } = run;
	const figures = evaluatedFigures(run);
	const held = (figure) =>
		(figures.get(figure) ?? [])
			.filter(({ source }) => source === null)
			.map(({ metric }) => line("held-out", evaluation, metric, { color: hue(1), low: undefined }));
	const planned = start?.model.device.startsWith("cpu") ? start.memory.totalBytes : null;
	const level = (curves, value) =>
		value === null || curves.steps.length === 0
			? null
			: { name: "planned", steps: curves.steps, mean: curves.steps.map(() => value), color: hue(3), dash: [6, 4] };
	const share = (_, min, max) => [Math.min(0, min ?? 0), Math.max(0.02, (max ?? 0) * 1.1)];
	const charts = [
		{
			key: "loss",
			title: "Loss",
			wide: true,
			format: measure,
			axis: short,
			log: true,
			lines: [line("training", training, "loss", { smooth: true }), ...held("loss")],
		},
		{
			key: "accuracy",
			title: "Tokens predicted",
			format: percent,
			axis: (value) => `${(100 * value).toFixed(0)} %`,
			lines: [line("training", training, "mean_token_accuracy", { smooth: true }), ...held("mean_token_accuracy")],
		},
		{
			key: "grad_norm",
			title: "Gradient norm",
			format: measure,
			axis: short,
			log: true,
			lines: [line("before clipping", training, "grad_norm", { smooth: true })],
		},
		{
			key: "learning_rate",
			title: "Learning rate",
			format: rate,
			axis: (value) => (value === 0 ? "0" : value.toExponential(1)),
			lines: [line("used", training, "learning_rate")],
		},
		{
			key: "tokens_per_second",
			title: "Tokens per second",
			format: count,
			lines: [line("all tokens", training, "tokens_per_second", { smooth: true })],
		},
		{
			key: "waiting_share",
			title: "Time waiting for rows",
			format: percent,
			range: share,
			lines: [line("share", training, "waiting_share")],
		},
		{
			key: "memory",
			title: planned === null ? "Memory of the process on the host" : "Memory",
			format: bytes,
			incrs: BINARY,
			range: (_, __, max) => [0, 1.1 * (max ?? 1)],
			lines: [line("process", training, "rss_bytes"), level(training, planned)],
		},
		{
			key: "entropy",
			title: "Entropy of the predictions (nats)",
			format: measure,
			axis: short,
			lines: [line("training", training, "entropy", { smooth: true }), ...held("entropy")],
		},
		{
			key: "loss_scale",
			title: "Loss scale",
			format: count,
			lines: [line("of the step", training, "loss_scale")],
		},
	];
	const inOwn = ["loss", "mean_token_accuracy", "entropy"];
	for (const [figure, metrics] of figures) {
		if (/runtime$|per_second$/.test(figure)) continue;
		const bySource = metrics.filter(({ source }) => source !== null);
		const own = inOwn.includes(figure) ? bySource : metrics;
		const format = /accuracy|rate|exact|right|share/.test(figure) ? percent : measure;
		charts.push({
			key: `eval_${figure}`,
			title: `Held-out ${figure.replaceAll("_", " ")}${own === bySource ? " by source" : ""}`,
			format,
			log: format === measure,
			axis: format === percent ? (value) => `${(100 * value).toFixed(0)} %` : short,
			lines: own.map(({ metric, source }, i) =>
				line(source ?? "all", evaluation, metric, { color: hue(i + 1), low: undefined }),
			),
		});
	}
	return charts
		.map((chart) => ({ ...chart, lines: chart.lines.filter((one) => one !== null) }))
		.filter(({ lines }) => lines.some(({ dash, mean }) => !dash && mean.some(known)));
}
