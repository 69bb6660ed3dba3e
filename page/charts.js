// Curves over steps, drawn by uPlot (a global of the page), each in a card with its key.
import { count, el, known, whole } from "./elements.js";
import { state } from "./state.js";

export const dark = matchMedia("(prefers-color-scheme: dark)");

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
/** Colours that differ from their neighbours, readable on the page's background. */
export const hue = (index) => `hsl(${(215 + index * 137.5) % 360} ${dark.matches ? "75% 68%" : "68% 42%"})`;
const faint = (line, part) => line.replace(/\)$/, ` / ${part})`);

/** More lines than this are drawn smooth alone. */
const MANY = 6;

/** The running mean of a curve, over about a twenty-fifth of it; the first values count as far as there are any. */
function smoothed(values) {
	const keep = 1 - 1 / Math.max(4, values.length / 25);
	let sum = 0;
	let weight = 0;
	return values.map((value) => {
		if (!known(value)) return null;
		sum = keep * sum + value;
		weight = keep * weight + 1;
		return sum / weight;
	});
}

/** Lines on one axis of steps. */
function joined(lines) {
	const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
	const place = new Map(steps.map((step, i) => [step, i]));
	const spread = (line, values) => {
		const out = new Array(steps.length).fill(null);
		line.steps.forEach((step, i) => {
			out[place.get(step)] = values[i];
		});
		return out;
	};
	return { steps, spread };
}

/** What uPlot draws of a chart: its data, series and bands, and the lines that the key above it names. */
function drawing(chart) {
	const { steps, spread } = joined(chart.lines);
	const data = [steps];
	const series = [{}];
	const bands = [];
	const keys = [];
	const add = (values, style) => {
		data.push(values);
		series.push({ spanGaps: true, points: { show: false }, ...style });
		return data.length - 1;
	};
	for (const line of chart.lines) {
		const mean = spread(line, line.mean);
		if (line.low) {
			const high = add(spread(line, line.high), { stroke: "transparent", width: 0 });
			const low = add(spread(line, line.low), { stroke: "transparent", width: 0 });
			bands.push({ series: [high, low], fill: faint(line.color, 0.18) });
		}
		const smooth = state.smooth && line.smooth && line.mean.length > 30;
		// Behind many smooth lines the rough ones would be a blur; the key has their values.
		const rough = chart.lines.length > MANY ? "transparent" : faint(line.color, 0.35);
		const raw = smooth ? add(mean, { stroke: rough, width: 1 }) : null;
		const values = smooth ? spread(line, smoothed(line.mean)) : mean;
		const few = line.mean.filter(known).length < 40;
		const at = add(values, {
			stroke: line.color,
			width: line.dash ? 1.5 : 2,
			dash: line.dash,
			points: { show: few && !line.dash, size: 5, fill: line.color },
		});
		// The key has the values as they were logged.
		keys.push({ ...line, at: raw ?? at });
	}
	return { data, series, bands, keys };
}

/** A chart in its card. `update` gives it other data, and keeps what the user has zoomed to. */
function makeChart(chart) {
	const body = el("div");
	const key = el("div", { class: "chart-head" });
	const card = el("section", { class: `card${chart.wide ? " wide" : ""}`, "data-chart": chart.key }, key, body);
	let plot = null;
	let shape = "";
	let drawn = null;
	let shown = chart;

	function showKey(index) {
		const parts = drawn.keys.map((line) => {
			const values = drawn.data[line.at];
			let i = index ?? values.length - 1;
			while (i >= 0 && !known(values[i])) i--;
			const value = i >= 0 ? shown.format(values[i]) : "-";
			const mark = el("i");
			mark.style.borderTopColor = line.color;
			if (line.dash) mark.style.borderTopStyle = "dashed";
			return el("span", { class: "key" }, mark, `${line.name} `, el("b", {}, value));
		});
		const step = index === null || index === undefined ? null : drawn.data[0][index];
		const at = step === null ? null : el("span", { class: "key" }, `step ${whole(step)}`);
		key.replaceChildren(el("h3", {}, shown.title), ...(at === null ? [] : [at]), ...parts.slice(0, 24));
	}

	function draw() {
		drawn = drawing(shown);
		const log = shown.log && state.log;
		const next = JSON.stringify([drawn.series, drawn.bands, log, shown.height]);
		if (plot !== null && next === shape) {
			const { min, max } = plot.scales.x;
			const all = plot.data[0];
			const zoomed = min > all[0] || max < all[all.length - 1];
			plot.setData(drawn.data, !zoomed);
			if (zoomed) plot.setScale("x", { min, max });
			showKey(null);
			return;
		}
		shape = next;
		plot?.destroy();
		const axis = { stroke: color("--soft"), font: "11px system-ui, sans-serif", ticks: { show: false } };
		const grid = { stroke: color("--grid"), width: 1 };
		const size = (_, values) => 14 + 6.3 * Math.max(3, ...(values ?? []).map((value) => String(value ?? "").length));
		const axisFormat = shown.axis ?? shown.format;
		plot = new uPlot(
			{
				width: Math.max(200, body.clientWidth),
				height: shown.height ?? (shown.wide ? 260 : 170),
				scales: { x: { time: false }, y: { distr: log ? 3 : 1, ...(shown.range && { range: shown.range }) } },
				axes: [
					{ ...axis, grid, values: (_, ticks) => ticks.map((tick) => (tick % 1 === 0 ? count(tick) : "")), size: 26 },
					{ ...axis, grid, size, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : axisFormat(tick))) },
				],
				series: drawn.series,
				bands: drawn.bands,
				legend: { show: false },
				cursor: { sync: { key: "step" }, y: false, points: { size: 6 } },
				hooks: { setCursor: [(u) => showKey(u.cursor.idx)] },
			},
			drawn.data,
			body,
		);
		showKey(null);
	}

	return {
		card,
		draw,
		update(next) {
			shown = next;
			draw();
		},
		resize() {
			plot?.setSize({ width: Math.max(200, body.clientWidth), height: plot.height });
		},
		restyle() {
			shape = "";
			draw();
		},
	};
}

/** The charts of a section, by their keys: made once, then given other data. */
export function chartGroup(parent) {
	const charts = new Map();
	return {
		update(list) {
			for (const chart of list) {
				const old = charts.get(chart.key);
				if (old) {
					old.update(chart);
					continue;
				}
				const made = makeChart(chart);
				charts.set(chart.key, made);
				parent.append(made.card);
				made.draw();
			}
			for (const [key, chart] of charts) {
				if (list.some((wanted) => wanted.key === key)) continue;
				chart.card.remove();
				charts.delete(key);
			}
		},
		each: (act) => charts.forEach(act),
	};
}
