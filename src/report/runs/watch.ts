/** A run as a few lines of a terminal that are drawn over and over. */
import { bytes, count, duration, measure, percent, rate } from "../format.js";
import type { RunReader } from "./read-run.js";

const BLOCKS = "▁▂▃▄▅▆▇█";

/** The lines of a run, each at most `width` columns. */
export function watchLines(run: RunReader, width: number): string[] {
	const { record, figures, training, evaluation } = run;
	const lines = [`${run.name}  ${run.state}  ${run.folder}`];
	if (record !== null) {
		const { model, totalSteps } = record.start;
		lines.push(`${model.modelType}, ${count(model.parameters)} parameters, ${model.dtype} on ${model.device}`);
		const step = figures?.step ?? record.start.firstStep;
		const left = secondsLeft(run);
		const rest = left === null || run.state !== "running" ? "" : `  ${duration(left)} left`;
		const done = totalSteps > 0 ? step / totalSteps : 0;
		lines.push(`step ${step}/${totalSteps}  ${bar(done, Math.min(40, width - 40))} ${percent(done)}${rest}`);
	}
	if (figures !== null) {
		const last = (name: string) => training.extent(name)?.last.value ?? 0;
		const share = last("waiting_share");
		lines.push(
			`${count(last("tokens_per_second"))} tokens/s  lr ${rate(last("learning_rate"))}  grad norm ${measure(last("grad_norm"))}  ${percent(share)} waiting for rows  ${bytes(last("rss_bytes"))}`,
			`${count(figures.tokens)} tokens in ${duration(figures.seconds)}, epoch ${figures.epoch.toFixed(2)}`,
		);
		for (const [name, table] of [
			["loss", training],
			["eval_loss", evaluation],
		] as const) {
			const extent = table.extent(name);
			if (extent === undefined) continue;
			const label = `${name} ${measure(extent.last.value)}, lowest ${measure(extent.lowest.value)} at step ${extent.lowest.step}`;
			lines.push("", label, sparkline(table.curves([name], Math.min(100, width)).metrics[name]?.mean ?? []));
		}
	}
	if (record?.error) lines.push("", `${record.error.code} ${record.error.message.split("\n")[0]}`);
	return lines.map((line) => line.slice(0, width));
}

/** A line for a log: the latest step and its figures. */
export function watchLine(run: RunReader): string {
	const { figures, training, evaluation } = run;
	const parts = [`step ${figures?.step ?? 0}${run.record === null ? "" : `/${run.record.start.totalSteps}`}`];
	const add = (name: string, value: number | undefined, text: (value: number) => string) => {
		if (value !== undefined) parts.push(`${name} ${text(value)}`);
	};
	add("loss", training.extent("loss")?.last.value, measure);
	add("eval_loss", evaluation.extent("eval_loss")?.last.value, measure);
	add("tokens/s", training.extent("tokens_per_second")?.last.value, count);
	const left = secondsLeft(run);
	if (left !== null && run.state === "running") parts.push(`${duration(left)} left`);
	return parts.join("  ");
}

/** Of the rest of the run, at the speed of the latest steps; null: no step is logged. */
function secondsLeft({ record, figures, training }: RunReader): number | null {
	const each = training.extent("step_seconds")?.last.value;
	if (record === null || figures === null || each === undefined) return null;
	return Math.max(0, record.start.totalSteps - figures.step) * each;
}

function bar(done: number, width: number): string {
	const all = Math.max(10, width);
	const filled = Math.round(all * Math.min(1, Math.max(0, done)));
	return `[${"=".repeat(filled)}${" ".repeat(all - filled)}]`;
}

/** Values as blocks of eight heights, from the lowest to the highest. */
export function sparkline(values: readonly (number | null)[]): string {
	const known = values.filter((value) => value !== null);
	const low = Math.min(...known);
	const span = Math.max(...known) - low;
	return values
		.map((value) => {
			if (value === null) return " ";
			return BLOCKS[span > 0 ? Math.min(7, Math.floor((8 * (value - low)) / span)) : 0];
		})
		.join("");
}
