/**
 * Reads a run from its folder: `run.json` and `metrics.jsonl`, also while it is in progress. Continues where it stopped reading, and
 * starts over where the run was resumed or replaced meanwhile.
 */
import { closeSync, fstatSync, openSync, readSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { METRICS_FILE } from "../metrics.js";
import { type Figures, figuresOf } from "./figures.js";
import { type HighestLosses, highestLossesOf } from "./highest-losses.js";
import { isAlive, type RecordedState, type RunRecord, readRecord } from "./record.js";
import { Samples } from "./samples.js";
import { type Sentence, sentencesOf } from "./sentences.js";
import { MetricsTable } from "./table.js";

/** Buckets of the curves of a run, at least. */
const BUCKETS = 200;
const READ_BYTES = 4 * 1024 * 1024;

/** `died`: its process ended without saying so. `unknown`: the folder has metrics and no record. */
export type RunState = RecordedState | "died" | "unknown";

/** A run as far as its files say. */
export class RunReader {
	readonly folder: string;
	record: RunRecord | null = null;
	training = new MetricsTable(BUCKETS);
	evaluation = new MetricsTable(BUCKETS);
	samples = new Samples();
	/** Of the newest evaluation that names such rows. */
	highestLosses: HighestLosses | null = null;
	/** Of the newest line about trained rows. */
	trainedRows: HighestLosses | null = null;
	#offset = 0;
	#lastElapsed = 0;

	constructor(folder: string) {
		this.folder = folder;
	}

	/** The name that people gave the run, else that of its folder. */
	get name(): string {
		return this.record?.name ?? basename(resolve(this.folder));
	}

	get state(): RunState {
		if (this.record === null) return "unknown";
		const { state, process } = this.record;
		return state === "running" && isAlive(process) === false ? "died" : state;
	}

	get figures(): Figures | null {
		return figuresOf(this.training, this.evaluation);
	}

	get sentences(): Sentence[] {
		return this.record === null ? [] : sentencesOf(this.record, this.figures, this.folder);
	}

	/** Reads what is new. Returns whether there was anything. */
	update(): boolean {
		const record = readRecord(this.folder);
		const changed = record?.updated !== this.record?.updated || record?.id !== this.record?.id;
		// Lines of later steps are cut off where a run resumes, and the file may have grown again since.
		if (record?.id !== this.record?.id) this.#restart();
		this.record = record;
		return this.#readLines() || changed;
	}

	#restart(): void {
		this.training = new MetricsTable(BUCKETS);
		this.evaluation = new MetricsTable(BUCKETS);
		this.samples = new Samples();
		this.highestLosses = null;
		this.trainedRows = null;
		this.#offset = 0;
		this.#lastElapsed = 0;
	}

	#readLines(): boolean {
		const file = openMetrics(this.folder);
		if (file === null) return false;
		try {
			const { size } = fstatSync(file);
			if (size < this.#offset) this.#restart();
			const before = this.#offset;
			const chunk = Buffer.allocUnsafe(Math.max(1, Math.min(READ_BYTES, size - this.#offset)));
			for (;;) {
				const read = readSync(file, chunk, 0, chunk.length, this.#offset);
				// An unfinished last line is read when it is whole.
				const end = chunk.subarray(0, read).lastIndexOf(10) + 1;
				if (end === 0) return this.#offset > before;
				for (const line of chunk.toString("utf8", 0, end - 1).split("\n")) this.#add(line);
				this.#offset += end;
			}
		} finally {
			closeSync(file);
		}
	}

	#add(line: string): void {
		const values = parsed(line);
		if (values === null) return;
		if (values.event !== undefined) {
			if (values.event === "sample") this.samples.add(values);
			if (values.event === "trained_rows") this.trainedRows = highestLossesOf(values) ?? this.trainedRows;
			return;
		}
		const { step, ...metrics } = values;
		this.highestLosses = highestLossesOf(values) ?? this.highestLosses;
		const numbers = Object.entries(metrics).filter((entry): entry is [string, number] => typeof entry[1] === "number");
		const evaluated = numbers.filter(([name]) => name.startsWith("eval_"));
		if (evaluated.length > 0) this.evaluation.add(step, evaluated);
		if (typeof metrics.loss !== "number" && typeof metrics.elapsed_seconds !== "number") return;
		const { elapsed_seconds: elapsed, data_seconds: waited } = metrics;
		if (typeof elapsed === "number") {
			const seconds = elapsed - this.#lastElapsed;
			this.#lastElapsed = elapsed;
			if (seconds > 0 && typeof waited === "number") numbers.push(["waiting_share", Math.min(1, waited / seconds)]);
		}
		this.training.add(
			step,
			numbers.filter(([name]) => !name.startsWith("eval_")),
		);
	}
}

function openMetrics(folder: string): number | null {
	try {
		return openSync(join(folder, METRICS_FILE), "r");
	} catch {
		return null;
	}
}

function parsed(line: string): ({ step: number } & Record<string, unknown>) | null {
	try {
		const value: unknown = JSON.parse(line);
		const step = (value as { step?: unknown } | null)?.step;
		return typeof step === "number" ? (value as { step: number }) : null;
	} catch {
		return null;
	}
}

/** Whether `folder` is the `output_dir` of a run. */
export function isRun(folder: string): boolean {
	return readRecord(folder) !== null || statSync(join(folder, METRICS_FILE), { throwIfNoEntry: false }) !== undefined;
}
