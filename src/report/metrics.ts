/**
 * `metrics.jsonl`: one JSON object a line, appended and on disk at once, so that a run that is killed keeps what it logged.
 * Knows nothing of what the lines hold but `step`.
 */
import { closeSync, fstatSync, fsyncSync, openSync, readFileSync, truncateSync } from "node:fs";
import { join } from "node:path";
import { writeAll } from "../disk/write-all.js";
import { toArlError } from "../errors.js";
import type { TrainEvent } from "../events.js";
import { jsonLine } from "./format.js";

/** The name of the file in `output_dir`. */
export const METRICS_FILE = "metrics.jsonl";

/** After which step a run resumes, and whether with the evaluation after that step. */
interface Resumed {
	step: number;
	evaluates?: boolean;
}

/** Numbers by name, `step` among them. */
export type MetricsLine = { step: number } & Record<string, unknown>;

/** The file of a run's metrics. */
export class MetricsFile {
	readonly path: string;
	#file: number | null;

	private constructor(path: string, file: number) {
		this.path = path;
		this.#file = file;
	}

	/**
	 * Opens the file for appending. `resumed`: lines of later steps are cut off, since those steps are made again; so
	 * is an unfinished last line, and what is known of an evaluation that is made again. Absent: the file starts empty.
	 */
	static open(path: string, resumed?: Resumed): MetricsFile {
		try {
			const file = openSync(path, "a");
			// By its path: Windows cuts no file through a handle that only appends.
			truncateSync(path, resumed === undefined ? 0 : keptBytes(readFileSync(path), resumed));
			return new MetricsFile(path, file);
		} catch (error) {
			throw toArlError(error, path);
		}
	}

	/** Appends a line, whole or not at all. Numbers that are not finite become strings, since JSON has none. */
	write(line: MetricsLine): void {
		if (this.#file === null) return;
		const before = fstatSync(this.#file).size;
		try {
			writeAll(this.#file, Buffer.from(`${jsonLine(line)}\n`));
			fsyncSync(this.#file);
		} catch (error) {
			const failure = toArlError(error, this.path);
			try {
				truncateSync(this.path, before);
			} catch (second) {
				failure.suppressed.push(toArlError(second, this.path));
			}
			throw failure;
		}
	}

	close(): void {
		if (this.#file !== null) closeSync(this.#file);
		this.#file = null;
	}
}

/** Writes what a run logs to the file in its `output_dir`. */
export class MetricsSink {
	readonly #path: string;
	readonly #runName: string | null;
	#file: MetricsFile | null = null;

	constructor({ output_dir, run_name }: { output_dir: string; run_name: string | null }) {
		this.#path = join(output_dir, METRICS_FILE);
		this.#runName = run_name;
	}

	event(event: TrainEvent): void {
		if (event.type === "resumed") this.#file = MetricsFile.open(this.#path, event);
		if (event.type === "start") this.#file ??= MetricsFile.open(this.#path);
		const name = this.#runName !== null && { run_name: this.#runName };
		if (event.type === "log") this.#file?.write({ ...event.metrics, ...name });
		if (event.type === "evaluate")
			this.#file?.write({ ...event.metrics, highest_losses: event.highestLosses, ...name });
		if (event.type === "trained_rows") {
			const { step, epoch, firstStep, highestLosses } = event;
			const rows = { event: "trained_rows", step, epoch, first_step: firstStep, highest_losses: highestLosses };
			this.#file?.write({ ...rows, ...name });
		}
		if (event.type === "sample") this.#file?.write({ event: "sample", ...event.sample, ...name });
	}

	close(): void {
		this.#file?.close();
	}
}

/** Bytes of the leading lines that a resumed run keeps. */
function keptBytes(content: Buffer, resumed: Resumed): number {
	let kept = 0;
	while (kept < content.length) {
		const end = content.indexOf(10, kept);
		if (end < 0) break;
		if (!keeps(content.toString("utf8", kept, end), resumed)) break;
		kept = end + 1;
	}
	return kept;
}

function keeps(line: string, resumed: Resumed): boolean {
	try {
		const value = JSON.parse(line) as Record<string, unknown> | null;
		if (typeof value?.step !== "number" || value.step > resumed.step) return false;
		return !(resumed.evaluates && value.step === resumed.step && ("eval_loss" in value || value.event === "sample"));
	} catch {
		return false;
	}
}
