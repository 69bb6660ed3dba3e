// The page of several runs: their curves of one metric, their figures, and the options that differ.
import { chartGroup, hue } from "./charts.js";
import { bytes, count, duration, el, measure, optionText, percent, rate, whole } from "./elements.js";
import { badge, controls, part, section, table } from "./parts.js";
import { line, short } from "./run-charts.js";
import { page, state } from "./state.js";

function allMetrics() {
	const names = state.runs.flatMap((run) => [
		...Object.keys(run.training.metrics),
		...run.evaluated.map(({ name }) => name),
	]);
	return [...new Set(names)];
}

function comparison() {
	const metric = state.metric;
	const lines = state.runs.flatMap((run, i) => {
		if (state.hidden.has(run.folder)) return [];
		const curves = metric.startsWith("eval_") ? run.evaluation : run.training;
		const found = line(run.name, curves, metric, { color: hue(i), smooth: true, low: undefined });
		return found === null ? [] : [found];
	});
	const format = /accuracy|share/.test(metric)
		? percent
		: metric === "rss_bytes"
			? bytes
			: /rate$/.test(metric)
				? rate
				: measure;
	const axis = format === measure ? short : format;
	return lines.length === 0
		? []
		: [{ key: "comparison", title: metric, wide: true, height: 360, format, axis, log: true, lines }];
}

function runTable(list, links, draw) {
	const head = [
		"",
		"run",
		"state",
		"steps",
		"loss",
		"lowest loss",
		"lowest held-out loss",
		"tokens",
		"tokens/s",
		"time",
		"waiting",
	];
	const number = (value) => el("td", { class: "number" }, value);
	const rows = list.map((run, i) => {
		const { figures, start } = run;
		const swatch = el("i", { class: "swatch" });
		swatch.style.background = hue(i);
		const box = el("input", {
			type: "checkbox",
			checked: !state.hidden.has(run.folder),
			"aria-label": `draw ${run.name}`,
			onchange: (event) => {
				state.hidden[event.target.checked ? "delete" : "add"](run.folder);
				draw();
			},
		});
		const name = links ? el("a", { href: links[i] }, run.name) : run.name;
		const loss = figures?.training.loss;
		const held = figures?.evaluation.eval_loss;
		const of = start === null ? "" : ` / ${whole(start.totalSteps)}`;
		const row = el(
			"tr",
			{ class: state.hidden.has(run.folder) ? "pale" : "" },
			el("td", {}, box, " ", swatch),
			el("td", { title: run.folder }, name),
			el("td", {}, badge(run.state)),
			number(figures ? `${whole(figures.step)}${of}` : "-"),
			number(loss ? measure(loss.last.value) : "-"),
			number(loss ? `${measure(loss.best.value)} at ${whole(loss.best.step)}` : "-"),
			number(held ? `${measure(held.best.value)} at ${whole(held.best.step)}` : "-"),
			number(figures ? count(figures.tokens) : "-"),
			number(figures ? count(figures.tokensPerSecond) : "-"),
			number(figures ? duration(figures.seconds) : "-"),
			number(figures && figures.seconds > 0 ? percent(figures.waitingSeconds / figures.seconds) : "-"),
		);
		return row;
	});
	const right = new Set(head.slice(3));
	return el(
		"div",
		{ class: "scroll card" },
		el(
			"table",
			{},
			el(
				"thead",
				{},
				el(
					"tr",
					{},
					head.map((text) => el("th", right.has(text) ? { class: "number" } : {}, text)),
				),
			),
			el("tbody", {}, rows),
		),
	);
}

function differences(list) {
	const names = [...new Set(list.flatMap(({ options }) => options.map(({ name }) => name)))];
	const value = (run, name) => {
		const option = run.options.find((one) => one.name === name);
		return option === undefined ? "-" : optionText(option.value);
	};
	const differing = names.filter(
		(name) => name !== "output_dir" && new Set(list.map((run) => value(run, name))).size > 1,
	);
	if (differing.length === 0) return null;
	const cell = (text) => el("td", { class: "option" }, text);
	return section(
		"Options that differ",
		table(
			["run", ...differing],
			list.map((run) => [el("td", {}, run.name), ...differing.map((name) => cell(value(run, name)))]),
		),
	);
}

export function runsPage() {
	const grid = el("div", { class: "charts" });
	const charts = chartGroup(grid);
	const list = part((shown) => runTable(shown, state.live?.pages, () => draw()));
	const options = part(differences);
	const choose = el("select", {
		"aria-label": "metric",
		onchange: (event) => {
			state.metric = event.target.value;
			draw();
		},
	});
	const draw = () => {
		const metrics = allMetrics();
		if (choose.children.length !== metrics.length) {
			choose.replaceChildren(
				...metrics.map((name) => el("option", { value: name, selected: name === state.metric }, name)),
			);
		}
		list.update(
			state.runs.map(({ name, folder, state, figures, start }) => ({ name, folder, state, figures, start })),
			[...state.hidden],
		);
		options.update(state.runs.map(({ name, options: given }) => ({ name, options: given })));
		charts.update(comparison());
	};
	page.replaceChildren(
		el("header", {}, el("h1", {}, `${state.runs.length} runs`)),
		controls(draw, el("label", {}, "metric ", choose)),
		grid,
		section("Runs", list.holder),
		options.holder,
	);
	draw();
	return { draw, charts };
}
