// The page of one run.
import { chartGroup } from "./charts.js";
import { bytes, count, duration, el, measure, optionText, percent, whole } from "./elements.js";
import { badge, controls, part, section, table } from "./parts.js";
import { runCharts } from "./run-charts.js";
import { page, state } from "./state.js";

function tiles(run) {
	const { figures, start } = run;
	if (figures === null) return null;
	const tile = (value, what) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, what));
	const loss = figures.training.loss;
	const held = figures.evaluation.eval_loss;
	const accuracy = figures.training.mean_token_accuracy;
	const total = start === null ? "" : ` of ${whole(start.totalSteps)}`;
	const share = figures.seconds > 0 ? figures.waitingSeconds / figures.seconds : 0;
	return el(
		"div",
		{ class: "tiles" },
		tile(whole(figures.step), `steps${total}, epoch ${figures.epoch.toFixed(2)}`),
		loss && tile(measure(loss.last.value), `loss, lowest ${measure(loss.best.value)} at step ${whole(loss.best.step)}`),
		held &&
			tile(
				measure(held.last.value),
				`held-out loss, lowest ${measure(held.best.value)} at step ${whole(held.best.step)}`,
			),
		accuracy && tile(percent(accuracy.last.value), "of the tokens predicted"),
		tile(count(figures.tokens), `tokens, ${count(figures.targetTokens)} of them trained`),
		tile(count(figures.tokensPerSecond), "tokens per second, on the whole"),
		tile(duration(figures.seconds), "of training"),
		tile(percent(share), "of the time waiting for rows"),
		start &&
			tile(
				bytes(start.memory.totalBytes),
				`memory planned${start.model.device.startsWith("cpu") ? "" : ` on ${start.model.device}`}`,
			),
		tile(bytes(figures.peakRssBytes), "most memory of the process"),
	);
}

function header(run) {
	const back = state.live?.all ? el("a", { href: state.live.all }, "all runs") : null;
	const when = run.updated === null ? "" : new Date(run.updated).toLocaleString();
	return el(
		"div",
		{},
		el(
			"header",
			{},
			el("h1", {}, run.name),
			badge(run.state),
			el("span", { class: "soft" }, when === "" ? "" : `as of ${when}`),
			back,
		),
		el("div", { class: "path" }, run.folder),
		run.error &&
			el(
				"div",
				{ class: "error" },
				`${run.error.code} ${run.error.message}${run.error.hint ? `\n${run.error.hint}` : ""}`,
			),
		run.state === "died" &&
			el(
				"div",
				{ class: "error" },
				"The process of this run ended without reporting it. Resume it with --resume_from_checkpoint latest.",
			),
		el(
			"ul",
			{ class: "sentences" },
			run.sentences.map(({ label, text }) => el("li", {}, el("span", { class: "soft" }, `${label}: `), text)),
		),
		tiles(run),
	);
}

/** Rows that are shown at once; the others unfold. */
const ROWS_SHOWN = 6;

function samples({ samples: { rows, others } }) {
	if (rows.length === 0) return null;
	const cards = rows.map(sampleCard);
	const rest = cards.slice(ROWS_SHOWN);
	const more = rest.length === 1 ? "1 more row" : `${rest.length} more rows`;
	return section(
		"Replies to held-out rows: before and now",
		...cards.slice(0, ROWS_SHOWN),
		rest.length > 0 ? el("details", {}, el("summary", {}, more), ...rest) : null,
		others > 0 ? el("p", { class: "soft" }, `${whole(others)} more rows have replies in metrics.jsonl.`) : null,
	);
}

function sampleCard({ location, source, prompt, before, now, expected }) {
	const text = (title, value) =>
		el("div", {}, el("span", { class: "soft" }, title), el("pre", {}, value === "" ? "(empty)" : value));
	const reply = (when, { step, text: said, right }) =>
		text(`${when}, step ${whole(step)}${right ? ", as expected" : ""}`, said);
	return el(
		"div",
		{ class: "card sample" },
		el("div", { class: "soft" }, `${location}${source === null ? "" : `, ${source}`}`),
		el("pre", {}, prompt),
		el("div", { class: "pair" }, reply("before", before), reply("now", now), text("expected", expected)),
	);
}

function highestLosses({ highestLosses: found }) {
	if (found === null) return null;
	return lossTable(`Held-out rows of the highest loss, after step ${whole(found.step)}`, found);
}

function trainedRows({ trainedRows: found }) {
	if (found === null) return null;
	const steps = `steps ${whole(found.firstStep ?? 1)} to ${whole(found.step)}`;
	return lossTable(`Trained rows of the highest loss, ${steps}`, found);
}

function lossTable(title, { rows }) {
	const several = rows.some(({ source }) => source !== null);
	const number = (text) => el("td", { class: "number" }, text);
	return section(
		title,
		table(
			["row", ...(several ? ["source"] : []), "loss of a target", "targets"],
			rows.map(({ location, source, loss, targets }) => [
				location,
				...(several ? [source ?? ""] : []),
				number(loss === null ? "not finite" : measure(loss)),
				number(whole(targets)),
			]),
		),
	);
}

function dataCounts(run) {
	const { start, rows, skipped } = run;
	if (start === null) return null;
	const { data, model, memory } = start;
	const pairs = [
		["rows from", data.source],
		["shape", data.shape],
		["rows", data.unbounded ? `at most ${whole(data.rows)}` : whole(data.rows)],
		["rows in an epoch", whole(data.rowsPerEpoch)],
	];
	if (rows !== null) {
		pairs.push(
			["encoded rows", whole(rows.rows)],
			["their tokens", `${whole(rows.tokens)}, ${whole(rows.targetTokens)} trained`],
		);
		if (rows.truncated > 0) pairs.push(["cut to max_length", whole(rows.truncated)]);
		if (rows.dropped > 0) pairs.push(["dropped as too long", whole(rows.dropped)]);
		if (rows.imagesDropped) pairs.push(["images dropped", whole(rows.imagesDropped.images)]);
	}
	for (const [reason, number] of Object.entries(skipped)) pairs.push([`left out: ${reason}`, whole(number)]);
	const modelPairs = [
		["model", model.path],
		["kind", `${model.modelType}, ${count(model.parameters)} parameters, ${model.dtype} on ${model.device}`],
		[
			"steps",
			`${whole(start.totalSteps)}, ${whole(start.stepsPerEpoch)} in an epoch, ${start.microBatchesPerStep === 1 ? "one micro-batch" : `${whole(start.microBatchesPerStep)} micro-batches`} each`,
		],
		["seed", String(start.seed)],
		...memory.categories.map(({ name, bytes: size }) => [`memory: ${name}`, bytes(size)]),
		...memory.hostCategories.map(({ name, bytes: size }) => [`host memory: ${name}`, bytes(size)]),
	];
	const list = (entries) =>
		table(
			[],
			entries.map(([name, value]) => [el("td", { class: "soft" }, name), el("td", { class: "value" }, value)]),
		);
	return el("div", { class: "columns" }, section("Rows", list(pairs)), section("Model and memory", list(modelPairs)));
}

function useIt({ commands }) {
	if (commands.length === 0) return null;
	return section(
		"Use the result",
		...commands.map(({ label, command }) =>
			el("div", {}, el("span", { class: "soft" }, label), el("pre", {}, command)),
		),
	);
}

function history({ parts, saves, warnings }) {
	const when = (iso) => new Date(iso).toLocaleString();
	const bodies = [
		parts.length > 1
			? table(
					["started", "after step", "changed options"],
					parts.map(({ started, firstStep, changed }) => [when(started), firstStep, changed.join("; ")]),
				)
			: null,
		saves.length > 0
			? table(
					["checkpoint after step", "why", "size", "written in"],
					saves.map(({ step, reason, bytes: size, seconds }) => [
						el("td", {}, whole(step)),
						reason,
						bytes(size),
						duration(seconds),
					]),
				)
			: null,
		...warnings.map((text) => el("div", { class: "error warning" }, text)),
	].filter((body) => body !== null);
	return bodies.length === 0 ? null : section("Checkpoints and events", ...bodies);
}

function configuration({ options }) {
	if (options.length === 0) return null;
	const rows = (list) =>
		list.map(({ name, value }) => [el("td", { class: "name" }, name), el("td", { class: "value" }, optionText(value))]);
	const given = options.filter(({ isDefault }) => !isDefault);
	const others = options.filter(({ isDefault }) => isDefault);
	return section(
		"Configuration",
		table([], rows(given)),
		el("details", {}, el("summary", {}, `${others.length} options with their defaults`), table([], rows(others))),
	);
}

export function runPage() {
	const pick =
		(...names) =>
		(run) =>
			Object.fromEntries(names.map((name) => [name, run[name]]));
	const parts = [[part(header), pick("name", "state", "updated", "folder", "error", "sentences", "figures", "start")]];
	const grid = el("div", { class: "charts" });
	const charts = chartGroup(grid);
	const below = [
		[part(samples), pick("samples")],
		[part(highestLosses), pick("highestLosses")],
		[part(trainedRows), pick("trainedRows")],
		[part(useIt), pick("commands")],
		[part(dataCounts), pick("start", "rows", "skipped")],
		[part(history), pick("parts", "saves", "warnings")],
		[part(configuration), pick("options")],
	];
	const draw = () => {
		for (const [one, choose] of [...parts, ...below]) one.update(choose(state.runs[0]));
		charts.update(runCharts(state.runs[0]));
	};
	page.replaceChildren(...parts.map(([one]) => one.holder), controls(draw), grid, ...below.map(([one]) => one.holder));
	draw();
	return { draw, charts };
}
