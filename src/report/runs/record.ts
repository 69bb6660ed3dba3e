/**
 * `run.json`: what a run is, in `output_dir` next to `metrics.jsonl`: its configuration without secrets, model, rows, memory,
 * checkpoints, and how it ended. Written whole at the start, at each checkpoint and at the end.
 */
import { readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { PARTIAL } from "../../disk/write-whole.js";
import type { ErrorJson } from "../../errors.js";
import type { EndEvent, FillEvent, SavedEvent, StartEvent } from "../../events.js";
import { jsonLine } from "../format.js";
import type { Figures } from "./figures.js";

/** The names of the files in `output_dir`: this one, and the page that is made of it and the metrics. */
export const RECORD_FILE = "run.json";
export const REPORT_FILE = "report.html";

/** The folder in `output_dir` of the model with its adapter merged into it. */
export const MERGED_FOLDER = "merged";

/** An option of the run as people see it. */
export interface ShownOption {
	name: string;
	/** A secret is `***`. */
	value: unknown;
	/** It has the default value. */
	isDefault: boolean;
}

/** A process of a system. */
export interface ProcessId {
	pid: number;
	host: string;
	/** When the system started it, as the system counts; null where the system does not say. Numbers of processes are used again. */
	birth: string | null;
}

/** `running` is also the state of a run whose process was killed: {@link isAlive} tells the two apart. */
export type RecordedState = "running" | "failed" | EndEvent["outcome"];

/** From a start, or a resumed one, to the end of the process. */
export interface Part {
	/** Steps done before it. */
	firstStep: number;
	/** ISO 8601. */
	started: string;
	/** Options that differ from those of the part before. */
	changed: string[];
}

export interface RunRecord {
	version: 1;
	/** Of this part of the run: differs after each start and each resume. */
	id: string;
	state: RecordedState;
	process: ProcessId;
	name: string | null;
	/** When this file was written. ISO 8601. */
	updated: string;
	options: ShownOption[];
	start: Omit<StartEvent, "type">;
	rows: Omit<FillEvent, "type"> | null;
	/** Rows left out with `on_bad_row skip`, by reason. */
	skipped: Record<string, number>;
	parts: Part[];
	saves: Omit<SavedEvent, "type">[];
	/** The latest warnings. */
	warnings: string[];
	end: Omit<EndEvent, "type"> | null;
	error: ErrorJson | null;
	/** What the metrics come to; null in a file that the start has written. */
	figures: Figures | null;
}

/** The record in `folder`; null: there is none that can be read. */
export function readRecord(folder: string): RunRecord | null {
	try {
		const value = JSON.parse(readFileSync(join(folder, RECORD_FILE), "utf8")) as RunRecord | null;
		return value?.version === 1 && Array.isArray(value.parts) ? value : null;
	} catch {
		return null;
	}
}

/** Writes the record of `folder`. */
export function writeRecord(folder: string, record: RunRecord): void {
	replaceFile(join(folder, RECORD_FILE), `${jsonLine(record)}\n`);
}

/**
 * Writes a small file that readers see whole, before or after. Not forced to disk: it is written again, and nothing depends
 * on it.
 */
export function replaceFile(path: string, content: string): void {
	const partial = `${path}${PARTIAL}`;
	try {
		writeFileSync(partial, content);
		renameSync(partial, path);
	} catch (error) {
		rmSync(partial, { force: true });
		throw error;
	}
}

/** This process. */
export function thisProcess(): ProcessId {
	return { pid: process.pid, host: hostname(), birth: birthOf(process.pid) };
}

/** Whether the process runs; null: it is on another machine. */
export function isAlive({ pid, host, birth }: ProcessId): boolean | null {
	if (host !== hostname()) return null;
	try {
		process.kill(pid, 0);
	} catch (error) {
		// A process of another user exists too.
		if ((error as NodeJS.ErrnoException).code !== "EPERM") return false;
	}
	return birth === null || birthOf(pid) === birth;
}

/** Field 22 of Linux's `/proc/PID/stat`, in clock ticks since the system's start. */
function birthOf(pid: number): string | null {
	try {
		const text = readFileSync(`/proc/${pid}/stat`, "utf8");
		// The name of the program, in brackets, may have spaces.
		return text.slice(text.lastIndexOf(")") + 2).split(" ")[19] ?? null;
	} catch {
		return null;
	}
}
