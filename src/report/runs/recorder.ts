/**
 * Writes `run.json` and `report.html` as a run proceeds: at its start (the record alone), at each checkpoint and at its end,
 * however it ends. A failure to write them becomes a warning, once, and never ends the run.
 */
import { join } from "node:path";
import { type ArlError, messageOf } from "../../errors.js";
import { type NoticeEvent, notice, type TrainEvent } from "../../events.js";
import { pageOf } from "../page/page.js";
import { RunReader } from "./read-run.js";
import {
	REPORT_FILE,
	type RunRecord,
	readRecord,
	replaceFile,
	type ShownOption,
	thisProcess,
	writeRecord,
} from "./record.js";

/** Warnings that a record keeps. */
const MOST_WARNINGS = 50;

/** What the recorder knows of the run in addition to its events. */
export interface RecorderOptions {
	outputDir: string;
	name: string | null;
	/** The configuration, without secrets. */
	options: ShownOption[];
	now?: () => Date;
}

export class RunRecorder {
	readonly #options: RecorderOptions;
	readonly #reader: RunReader;
	readonly #now: () => Date;
	#record: RunRecord | null = null;
	/** Of the run that is resumed: its record, and the step. */
	#resumed: { record: RunRecord | null; step: number; changed: string[] } | null = null;
	#early: Pick<RunRecord, "rows" | "skipped" | "warnings"> = { rows: null, skipped: {}, warnings: [] };
	#failed = false;

	constructor(options: RecorderOptions) {
		this.#options = options;
		this.#reader = new RunReader(options.outputDir);
		this.#now = options.now ?? (() => new Date());
	}

	/** Takes an event, after `metrics.jsonl` has it. Returns a warning the first time that something cannot be written. */
	event(event: TrainEvent): NoticeEvent[] {
		switch (event.type) {
			case "notice":
				if (event.level === "warning") this.#keepWarning(event.message);
				return [];
			case "fill": {
				const { type: _, ...rows } = event;
				this.#kept().rows = rows;
				return [];
			}
			case "rows_skipped":
				this.#kept().skipped = event.reasons;
				return [];
			case "resumed":
				this.#resumed = { record: readRecord(this.#options.outputDir), step: event.step, changed: event.changed };
				return [];
			case "start": {
				const { type: _, ...start } = event;
				this.#record = this.#begin(start);
				return this.#write({ page: false });
			}
			case "saved": {
				const { type: _, ...saved } = event;
				this.#record?.saves.push(saved);
				return this.#write({ page: true });
			}
			case "removed":
				if (this.#record) this.#record.saves = this.#record.saves.filter(({ path }) => path !== event.path);
				return [];
			case "end": {
				if (this.#record === null) return [];
				const { type: _, ...end } = event;
				// Nothing was saved, and what the run had set aside is in the folder again: the record there is another run's.
				if (end.modelPath === null && readRecord(end.outputDir)?.id !== this.#record.id) {
					this.#record = null;
					return [];
				}
				Object.assign(this.#record, { end, state: event.outcome });
				return this.#write({ page: true });
			}
			default:
				return [];
		}
	}

	/** The run has ended with this error. */
	failed(error: ArlError): void {
		if (this.#record === null || this.#record.state !== "running") return;
		Object.assign(this.#record, { error: error.toJSON(), state: "failed" });
		this.#write({ page: true });
	}

	/** The run is over. Where neither its end nor an error was reported, its reader has left it. */
	close(): void {
		if (this.#record === null || this.#record.state !== "running") return;
		this.#record.state = "stopped";
		this.#write({ page: true });
	}

	/** Where what happens before the start is kept until then. */
	#kept(): Pick<RunRecord, "rows" | "skipped" | "warnings"> {
		return this.#record ?? this.#early;
	}

	#keepWarning(message: string): void {
		const { warnings } = this.#kept();
		warnings.push(message);
		if (warnings.length > MOST_WARNINGS) warnings.shift();
	}

	#begin(start: RunRecord["start"]): RunRecord {
		const started = this.#now().toISOString();
		const before = this.#resumed?.record ?? null;
		const firstStep = this.#resumed?.step ?? 0;
		const part = { firstStep, started, changed: this.#resumed?.changed ?? [] };
		return {
			version: 1,
			id: `${started} ${process.pid}`,
			state: "running",
			process: thisProcess(),
			name: this.#options.name,
			updated: started,
			options: this.#options.options,
			start,
			...this.#early,
			parts: [...(before?.parts ?? []), part],
			saves: (before?.saves ?? []).filter(({ step }) => step <= firstStep),
			end: null,
			error: null,
			figures: null,
		};
	}

	#write({ page }: { page: boolean }): NoticeEvent[] {
		const record = this.#record;
		if (record === null) return [];
		const { outputDir } = this.#options;
		record.updated = this.#now().toISOString();
		try {
			if (page) {
				this.#reader.update();
				record.figures = this.#reader.figures;
			}
			writeRecord(outputDir, record);
			if (!page) return [];
			// The record in the folder is now this one.
			this.#reader.update();
			replaceFile(join(outputDir, REPORT_FILE), pageOf([this.#reader]));
			return [];
		} catch (error) {
			if (this.#failed) return [];
			this.#failed = true;
			return [notice("warning", `${REPORT_FILE} cannot be written, and the run continues: ${messageOf(error)}`)];
		}
	}
}
