/** Runs as text and as JSON, for `arl runs`. */
import { bytes, count, duration, measure, percent } from "../format.js";
import { textTable } from "../text-table.js";
import type { Course, Figures } from "./figures.js";
import type { RunReader } from "./read-run.js";
import type { ShownOption } from "./record.js";
import { courseText } from "./sentences.js";

/** A run as one JSON value. */
export function runJson(run: RunReader): Record<string, unknown> {
	const { folder, name, state, figures, sentences, record } = run;
	return { folder, name, state, figures, sentences, record };
}

/** A table of runs, a line each. */
export function runsTable(runs: readonly RunReader[]): string[] {
	const head = ["run", "state", "steps", "loss", "lowest", "eval_loss", "lowest", "tokens", "time", "started"];
	const rows = runs.map((run) => {
		const { figures, record } = run;
		const total = record === null ? "" : `/${record.start.totalSteps}`;
		const course = (one: Course | undefined) =>
			one === undefined ? ["-", "-"] : [measure(one.last.value), `${measure(one.best.value)} at ${one.best.step}`];
		return [
			run.folder,
			run.state,
			figures === null ? `0${total}` : `${figures.step}${total}`,
			...course(figures?.training.loss),
			...course(figures?.evaluation.eval_loss),
			figures === null ? "-" : count(figures.tokens),
			figures === null ? "-" : duration(figures.seconds),
			record === null ? "-" : minute(record.parts[0]?.started ?? record.updated),
		];
	});
	return textTable([head, ...rows], [2, 3, 5, 7, 8]);
}

/** All that is known of a run, for people. */
export function runText(run: RunReader): string[] {
	const { record, figures } = run;
	const lines = [`${run.folder}: ${run.state}${record?.name ? `, ${record.name}` : ""}`];
	if (record === null) return [...lines, ...(figures === null ? ["no metrics"] : metricLines(figures))];
	const { start, rows, parts, saves, warnings, error } = record;
	const { model, data } = start;
	const trained = rows === null ? "" : `, ${count(rows.tokens)} tokens (${count(rows.targetTokens)} trained)`;
	const facts = [
		[
			"model",
			`${model.path}: ${model.modelType}, ${count(model.parameters)} parameters, ${model.dtype} on ${model.device}`,
		],
		["rows", `${data.source}: ${data.rows} of ${data.shape}${trained}`],
		["steps", `${figures?.step ?? start.firstStep} of ${start.totalSteps}`],
		["started", parts.map(({ started }) => minute(started)).join(", resumed ")],
		...run.sentences.map(({ label, text }) => [label, text]),
		...saves.map(({ step, bytes: size, reason }) => ["saved", `checkpoint-${step}, ${bytes(size)} (${reason})`]),
		...warnings.map((text) => ["warning", text]),
		...(error === null ? [] : [["error", `${error.code} ${error.message}`]]),
	];
	lines.push(...textTable(facts), "", "options that differ from their defaults:");
	const given = record.options.filter(({ isDefault }) => !isDefault);
	lines.push(...textTable(given.map(({ name, value }) => [`  ${name}`, optionText(value)])));
	return lines;
}

function metricLines({ training, evaluation }: Figures): string[] {
	return Object.entries({ ...training, ...evaluation }).map(([name, course]) => courseText(name, course));
}

/** How two runs differ. */
export interface Difference {
	options: { name: string; values: unknown[] }[];
	/** A figure that a run does not have is null. */
	figures: { name: string; values: (number | null)[] }[];
}

/** The options in which the runs differ (but not the folder, which always does), and the figures of each. */
export function difference(runs: readonly RunReader[]): Difference {
	const options = runs.map(({ record }) => new Map((record?.options ?? []).map((option) => [option.name, option])));
	const names = [...new Set(options.flatMap((one) => [...one.keys()]))].filter((name) => name !== "output_dir");
	const valueIn = (one: ReadonlyMap<string, ShownOption>, name: string) => one.get(name)?.value ?? null;
	const figures = runs.map(({ figures: found }) => flatFigures(found));
	return {
		options: names
			.map((name) => ({ name, values: options.map((one) => valueIn(one, name)) }))
			.filter(({ values }) => new Set(values.map((value) => JSON.stringify(value))).size > 1),
		figures: [...new Set(figures.flatMap((one) => [...one.keys()]))].map((name) => ({
			name,
			values: figures.map((one) => one.get(name) ?? null),
		})),
	};
}

/** The figures that runs are compared by, by name. */
function flatFigures(figures: Figures | null): Map<string, number> {
	if (figures === null) return new Map();
	const courses = Object.entries({ ...figures.training, ...figures.evaluation }).flatMap(
		([name, { last, best }]): [string, number][] => [
			[name, last.value],
			[`best ${name}`, best.value],
			[`step of the best ${name}`, best.step],
		],
	);
	return new Map<string, number>([
		["steps", figures.step],
		...courses,
		["tokens", figures.tokens],
		["seconds", figures.seconds],
		["tokens per second", figures.tokensPerSecond],
		["share of time waiting for rows", figures.seconds > 0 ? figures.waitingSeconds / figures.seconds : 0],
		["peak memory of the process", figures.peakRssBytes],
	]);
}

/** The differences as lines of text. */
export function differenceText(runs: readonly RunReader[], { options, figures }: Difference): string[] {
	const head = ["", ...runs.map(({ folder }) => folder)];
	const optionRows = options.map(({ name, values }) => [name, ...values.map(optionText)]);
	const figureRows = figures.map(({ name, values }) => [name, ...values.map((value) => figureText(name, value))]);
	const all = textTable([head, ...optionRows, ...figureRows]);
	return [
		all[0] ?? "",
		options.length === 0 ? "all options are equal" : "options that differ:",
		...all.slice(1, 1 + options.length).map((line) => `  ${line}`),
		"figures:",
		...all.slice(1 + options.length).map((line) => `  ${line}`),
	];
}

function figureText(name: string, value: number | null): string {
	if (value === null) return "-";
	if (name.startsWith("step")) return String(value);
	if (name.startsWith("share")) return percent(value);
	if (name.includes("memory")) return bytes(value);
	if (name === "seconds") return duration(value);
	return name.startsWith("token") ? count(value) : measure(value);
}

function optionText(value: unknown): string {
	const empty = value === null || (typeof value === "object" && Object.keys(value).length === 0);
	return empty ? "none" : typeof value === "string" ? value : JSON.stringify(value);
}

/** A time of ISO 8601 to the minute, in this machine's zone. */
function minute(iso: string): string {
	const date = new Date(iso);
	const two = (value: number) => String(value).padStart(2, "0");
	return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}`;
}
