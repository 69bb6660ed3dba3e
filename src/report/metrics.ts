/**
 * `metrics.jsonl`: one JSON object a line, appended and on disk at once, so that a run that is killed keeps what it logged.
 * Knows nothing of what the lines hold but `step`.
 */
import { closeSync, fsyncSync, ftruncateSync, openSync, readFileSync, writeSync } from "node:fs";
import { toArlError } from "../errors.js";
import { jsonLine } from "./format.js";

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
	 * Opens the file for appending. `resumeStep`: lines of later steps are cut off, since those steps are made again; so
	 * is an unfinished last line. Absent: the file starts empty.
	 */
	static open(path: string, resumeStep?: number): MetricsFile {
		try {
			if (resumeStep === undefined) return new MetricsFile(path, openSync(path, "w"));
			const file = openSync(path, "a");
			ftruncateSync(file, keptBytes(readFileSync(path), resumeStep));
			return new MetricsFile(path, file);
		} catch (error) {
			throw toArlError(error);
		}
	}

	/** Appends a line. Numbers that are not finite become strings, since JSON has none. */
	write(line: MetricsLine): void {
		if (this.#file === null) return;
		try {
			writeSync(this.#file, `${jsonLine(line)}\n`);
			fsyncSync(this.#file);
		} catch (error) {
			throw toArlError(error);
		}
	}

	close(): void {
		if (this.#file !== null) closeSync(this.#file);
		this.#file = null;
	}
}

/** Bytes of the leading lines whose step is at most `step`. */
function keptBytes(content: Buffer, step: number): number {
	let kept = 0;
	while (kept < content.length) {
		const end = content.indexOf(10, kept);
		if (end < 0) break;
		if (!(stepOf(content.toString("utf8", kept, end)) <= step)) break;
		kept = end + 1;
	}
	return kept;
}

function stepOf(line: string): number {
	try {
		const value: unknown = JSON.parse(line);
		const step = (value as { step?: unknown } | null)?.step;
		return typeof step === "number" ? step : Number.NaN;
	} catch {
		return Number.NaN;
	}
}
