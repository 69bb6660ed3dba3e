/**
 * Events of a run to what a user reads: lines and a live line for people, or JSON. Writes to the streams it is given;
 * decides nothing about the run.
 */
import { join } from "node:path";
import pc from "picocolors";
import type { ArlError } from "../errors.js";
import { formatError } from "../errors.js";
import type { EventOf, TrainEvent } from "../events.js";
import {
	bytes,
	count,
	droppedImages,
	duration,
	imagesText,
	jsonLine,
	measure,
	percent,
	rate,
	rowsText,
} from "./format.js";
import { fitParts, LiveLine, type Part, type Terminal } from "./live.js";
import { METRICS_FILE } from "./metrics.js";

/** Somebody who shows a run. */
export interface Reporter {
	event(event: TrainEvent): void;
	/** A line next to the events. */
	note(text: string): void;
	/** The run has ended with this error. */
	error(error: ArlError): void;
	/** Takes the live line away. */
	close(): void;
}

export interface ReporterOptions {
	/** Where lines for people go. */
	stream: Terminal;
	/** A live line suits the stream. */
	live: boolean;
	color: boolean;
	/** Errors with their trace. */
	trace?: boolean;
	/** Errors without a hint point to `arl explain`. */
	explain?: boolean;
	now?: () => number;
}

/** How a run ended, in words. */
const OUTCOMES = {
	completed: "done",
	early_stopped: "stopped early, because the evaluations were no longer better",
	interrupted: "interrupted",
	stopped: "stopped",
} as const;

/** Rows that are named one by one above a live line; the rest is counted there. A log names every one. */
const ROWS_SHOWN = 20;
/** Seconds between two plain lines on rows being encoded. */
const FILL_EVERY = 10;

/** Lines for people, with a live line on a terminal. */
export class TextReporter implements Reporter {
	readonly #options: ReporterOptions;
	readonly #live: LiveLine | null;
	readonly #colors: ReturnType<typeof pc.createColors>;
	#speed = Number.NaN;
	#filled = 0;
	#outputDir = "";

	constructor(options: ReporterOptions) {
		this.#options = options;
		this.#live = options.live ? new LiveLine(options.stream, options.now) : null;
		this.#colors = pc.createColors(options.color);
	}

	event(event: TrainEvent): void {
		const { dim, green, yellow } = this.#colors;
		switch (event.type) {
			case "notice":
				this.#line(event.level === "warning" ? yellow(`warning: ${event.message}`) : `note: ${event.message}`);
				break;
			case "check":
				this.#line(`${green("ok")} ${event.name}: ${event.message}`);
				break;
			case "download":
				this.#download(event);
				break;
			case "rows_skipped":
				this.#rowsSkipped(event);
				break;
			case "fill":
				this.#fill(event);
				break;
			case "start":
				this.#start(event);
				break;
			case "resumed":
				this.#line(`resuming after step ${event.step} from ${event.checkpoint}`);
				for (const change of event.changed) this.#line(`  changed: ${change}`);
				break;
			case "step":
				this.#step(event);
				break;
			case "log":
				this.#log(event);
				break;
			case "evaluating":
				this.#live?.show(evaluatingParts(event));
				break;
			case "evaluate":
				this.#evaluated(event);
				break;
			case "sample":
			case "trained_rows":
			case "epoch":
				break;
			case "saved":
				this.#line(dim(`saved ${event.path} (${bytes(event.bytes)} in ${duration(event.seconds)})`));
				break;
			case "removed":
				this.#line(dim(`removed ${event.path} (${event.reason.replaceAll("_", " ")})`));
				break;
			case "end":
				this.#end(event);
				break;
		}
	}

	note(text: string): void {
		this.#line(text);
	}

	error(error: ArlError): void {
		this.close();
		this.#options.stream.write(formatError(error, this.#options));
	}

	close(): void {
		this.#live?.clear();
	}

	#line(text: string): void {
		if (this.#live) this.#live.above(text);
		else this.#options.stream.write(`${text}\n`);
	}

	#rowsSkipped(event: EventOf<"rows_skipped">): void {
		const total = Object.values(event.reasons).reduce((sum, rows) => sum + rows, 0);
		const reasons = Object.entries(event.reasons).map(([reason, rows]) => `${reason}: ${rows}`);
		this.#line(this.#colors.yellow(`left out ${rowsText(total)} that cannot be used (${reasons.join(", ")})`));
		const shown = this.#live ? ROWS_SHOWN : event.rows.length;
		for (const { location, reason, message } of event.rows.slice(0, shown)) {
			this.#line(`  ${location}: ${message === "" ? reason : message}`);
		}
		if (event.rows.length > shown) {
			this.#line(`  and ${event.rows.length - shown} more; --disable_tqdm and --json name every one`);
		}
	}

	#download(event: EventOf<"download">): void {
		const parts = downloadParts(event);
		if (this.#live) this.#live.show(parts);
		else if (event.seconds - this.#filled >= FILL_EVERY) {
			this.#filled = event.seconds;
			this.#line(fitParts(parts, Number.POSITIVE_INFINITY));
		}
	}

	#fill(event: EventOf<"fill">): void {
		const speed = event.seconds > 0 ? `${count(event.tokens / event.seconds)} tokens/s` : "";
		if (event.complete) {
			const lost = [
				event.truncated > 0 ? `${rowsText(event.truncated)} cut to max_length` : "",
				event.dropped > 0 ? `${rowsText(event.dropped)} dropped as too long` : "",
				event.imagesDropped ? droppedImages(event.imagesDropped) : "",
			].filter((text) => text !== "");
			const share = event.tokens > 0 ? ` (${percent(event.targetTokens / event.tokens)} trained)` : "";
			this.#line(
				`encoded ${rowsText(event.rows)}${imagesText(event.images)}, ${count(event.tokens)} tokens${share}${speed === "" ? "" : `, ${speed}`}${lost.length > 0 ? `; ${this.#colors.yellow(lost.join(", "))}` : ""}`,
			);
			return;
		}
		const done = event.totalRows > 0 ? percent(event.rows / event.totalRows) : "";
		const parts = [
			{ text: `encoding rows ${event.rows}/${event.totalRows}`, keep: 9 },
			{ text: done, keep: 5 },
			{ text: speed, keep: 3 },
		];
		if (this.#live) this.#live.show(parts);
		else if (event.seconds - this.#filled >= FILL_EVERY) {
			this.#filled = event.seconds;
			this.#line(parts.map(({ text }) => text).join("  "));
		}
	}

	#start(event: EventOf<"start">): void {
		this.#outputDir = event.outputDir;
		const { model, data } = event;
		this.#line(
			`model    ${model.path}: ${model.modelType}, ${count(model.parameters)} parameters, ${model.dtype} on ${model.device}`,
		);
		this.#line(
			`rows     ${data.source}: ${data.unbounded ? "at most " : ""}${rowsText(data.rows)} of ${data.shape}${data.cached ? ", encoded before" : ""}`,
		);
		const most = [...event.memory.categories].sort((a, b) => b.bytes - a.bytes).slice(0, 3);
		const named = most.map(({ name, bytes: size }) => `${name} ${bytes(size)}`);
		const { totalBytes, hostBytes } = event.memory;
		const host = hostBytes > 0 ? `; ${bytes(hostBytes)} in host memory` : "";
		this.#line(`memory   ${bytes(totalBytes)}${named.length > 0 ? ` (${named.join(", ")})` : ""}${host}`);
		const micro =
			event.microBatchesPerStep === 1 ? "one micro-batch" : `${count(event.microBatchesPerStep)} micro-batches`;
		this.#line(
			`steps    ${event.totalSteps - event.firstStep} of ${event.totalSteps}, ${micro} each, ${event.epochs === 1 ? "1 epoch" : `${Number(event.epochs.toFixed(3))} epochs`}`,
		);
		this.#line(`output   ${event.outputDir}`);
	}

	#step(event: EventOf<"step">): void {
		const speed = event.seconds > 0 ? event.tokens / event.seconds : Number.NaN;
		// A running mean over about ten steps: the figure can be read while it moves.
		this.#speed = Number.isFinite(this.#speed) ? 0.9 * this.#speed + 0.1 * speed : speed;
		this.#live?.show(stepParts(event, this.#speed));
	}

	#log({ metrics }: EventOf<"log">): void {
		const { dim } = this.#colors;
		this.#line(
			[
				`${dim("step")} ${metrics.step}`,
				`${dim("epoch")} ${metrics.epoch.toFixed(2)}`,
				`${dim("loss")} ${measure(metrics.loss)}`,
				`${dim("grad_norm")} ${measure(metrics.grad_norm)}`,
				`${dim("lr")} ${rate(metrics.learning_rate)}`,
				...(metrics.loss_scale === undefined ? [] : [`${dim("loss_scale")} ${metrics.loss_scale}`]),
				...(metrics.skipped_steps ? [`${dim("skipped")} ${metrics.skipped_steps}`] : []),
				`${dim("accuracy")} ${percent(metrics.mean_token_accuracy)}`,
				`${count(metrics.tokens_per_second)} tokens/s`,
			].join("  "),
		);
	}

	#evaluated({ metrics, best }: EventOf<"evaluate">): void {
		const { dim, green } = this.#colors;
		this.#line(
			[
				`${dim("step")} ${metrics.step}`,
				`${dim("epoch")} ${metrics.epoch.toFixed(2)}`,
				`${dim("eval_loss")} ${measure(metrics.eval_loss)}`,
				`${dim("eval_accuracy")} ${percent(metrics.eval_mean_token_accuracy)}`,
				`${dim("eval_perplexity")} ${measure(metrics.eval_perplexity)}`,
				...("eval_exact_match" in metrics
					? [`${dim("exact")} ${percent(metrics.eval_exact_match ?? Number.NaN)}`]
					: []),
				duration(metrics.eval_runtime),
				...(best ? [green("best")] : []),
			].join("  "),
		);
	}

	#end(event: EventOf<"end">): void {
		this.#live?.clear();
		const { bold } = this.#colors;
		const how = OUTCOMES[event.outcome];
		const loss = event.trainLoss === null ? "" : `, mean loss ${measure(event.trainLoss)}`;
		this.#line(
			bold(
				`${how}: step ${event.steps} of ${event.totalSteps} in ${duration(event.seconds)}, ${count(event.numTokens)} tokens${loss}`,
			),
		);
		this.#line(`model    ${event.modelPath ?? "not saved: no step was finished"}`);
		this.#line(`metrics  ${join(event.outputDir || this.#outputDir, METRICS_FILE)}`);
		if ((event.outcome === "interrupted" || event.outcome === "stopped") && event.modelPath !== null)
			this.#line("resume with --resume_from_checkpoint latest");
	}
}

/** What the live line says of fetching. */
export function downloadParts({ name, bytes: done, totalBytes, seconds }: Omit<EventOf<"download">, "type">): Part[] {
	const speed = seconds > 0 ? done / seconds : 0;
	return [
		{ text: `fetching ${name}`, keep: 9 },
		{ text: bar(totalBytes > 0 ? done / totalBytes : 1), keep: 0 },
		{ text: `${bytes(done)} of ${bytes(totalBytes)}`, keep: 7 },
		{ text: `${bytes(speed)}/s`, keep: 3 },
		{ text: speed > 0 ? `${duration((totalBytes - done) / speed)} left` : "", keep: 5 },
	];
}

/** What the live line says of an evaluation. */
export function evaluatingParts({ rows, totalRows }: Pick<EventOf<"evaluating">, "rows" | "totalRows">): Part[] {
	return [
		{ text: `evaluating held-out rows ${rows}/${totalRows}`, keep: 9 },
		{ text: bar(rows / totalRows), keep: 0 },
		{ text: percent(rows / totalRows), keep: 5 },
	];
}

/** What the live line says of a step; what matters least goes first where the terminal is narrow. */
export function stepParts(event: EventOf<"step">, tokensPerSecond: number): Part[] {
	const done = event.totalSteps > 0 ? event.step / event.totalSteps : 0;
	return [
		{ text: `step ${event.step}/${event.totalSteps}`, keep: 9 },
		{ text: bar(done), keep: 0 },
		{ text: `loss ${measure(event.loss)}`, keep: 8 },
		{ text: `lr ${rate(event.learningRate)}`, keep: 4 },
		{ text: `grad norm ${measure(event.gradNorm)}`, keep: 3 },
		{ text: `${count(tokensPerSecond)} tokens/s`, keep: 6 },
		{
			text: event.flops > 0 && event.seconds > 0 ? `${count(event.flops / event.seconds / 1e9)} GFLOP/s` : "",
			keep: 1,
		},
		{ text: bytes(event.rssBytes), keep: 2 },
		{ text: `${duration(event.secondsLeft)} left`, keep: 7 },
	];
}

function bar(done: number): string {
	const filled = Math.round(16 * Math.min(1, Math.max(0, done)));
	return `[${"=".repeat(filled)}${" ".repeat(16 - filled)}]`;
}

/** One JSON event a line; errors go to people as well. */
export class JsonReporter implements Reporter {
	readonly #out: Terminal;
	readonly #people: Reporter;

	/** `people` hears of notes and errors only. */
	constructor(out: Terminal, people: Reporter) {
		this.#out = out;
		this.#people = people;
	}

	event(event: TrainEvent): void {
		this.#out.write(`${jsonLine(event)}\n`);
	}

	note(text: string): void {
		this.#people.note(text);
	}

	error(error: ArlError): void {
		this.#out.write(`${jsonLine({ type: "error", ...error.toJSON(), exitCode: error.exitCode })}\n`);
		this.#people.error(error);
	}

	close(): void {
		this.#people.close();
	}
}
