/**
 * Sends the lines of a file to a service, in the background and from where the last attempt stopped: the file is the queue. A
 * service that does not answer is asked again, later and later; the run neither waits for it nor fails. What is sent, and what the
 * sink has to remember, is in `.sinks/NAME.json`, so that another process continues there.
 */
import { mkdirSync, readFileSync } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import { messageOf } from "../../errors.js";
import { replaceFile } from "../runs/record.js";

/** The folder in `output_dir` with what is sent, and with messages that wait. */
export const SINKS_FOLDER = ".sinks";
/** The folder in `output_dir` with TensorBoard's files. */
export const TENSORBOARD_FOLDER = "tensorboard";

/** Bytes that are sent at once, about. */
const BATCH_BYTES = 32 * 1024;
const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 60_000;
/** At the end of the run, when time is short. */
const LAST_PAUSE = 250;

/** What a sink remembers between two processes; never a secret. */
export type Memory = Record<string, string | number | boolean>;

/** A service that takes lines. */
export interface Sink {
	readonly name: string;
	/** The file of lines, within `output_dir`. */
	readonly source: string;
	/**
	 * Sends lines, oldest first; what it throws means that none counts as sent, and all are sent again later. It may change
	 * `memory`.
	 */
	send(lines: readonly string[], memory: Memory, signal: AbortSignal): Promise<void>;
	/** Reports the end of the run, after all lines. Absent: there is nothing to report. */
	finish?(outcome: string, memory: Memory, signal: AbortSignal): Promise<void>;
}

/** A sink's state on disk. */
interface Progress {
	/** Bytes of the source that are sent. */
	offset: number;
	memory: Memory;
	/** How the run ended, if the sink has reported that. */
	finished: string | null;
}

/** One sink with its queue. */
export class Outbox {
	readonly sink: Sink;
	/** Why the last attempt failed; null: it did not, or was given up. */
	problem: string | null = null;
	readonly #folder: string;
	#progress: Progress = { offset: 0, memory: {}, finished: null };
	#outcome: string | null = null;
	#pause = FIRST_PAUSE;
	#timer: NodeJS.Timeout | null = null;
	#working: Promise<void> | null = null;
	#again = false;
	readonly #abort = new AbortController();

	/** `folder`: the `output_dir`. */
	constructor(sink: Sink, folder: string) {
		this.sink = sink;
		this.#folder = folder;
	}

	/** Takes up the queue. `fresh`: of another run than what the folder remembers. */
	begin(fresh: boolean): void {
		mkdirSync(join(this.#folder, SINKS_FOLDER), { recursive: true });
		if (!fresh) this.#progress = this.#read() ?? this.#progress;
		this.#save();
	}

	/** The source was cut to `size` bytes: what was sent of the rest is sent again as it is written again. */
	cut(size: number): void {
		this.#progress.offset = Math.min(this.#progress.offset, size);
		this.#progress.finished = null;
		this.#save();
	}

	/** There may be something to send. Returns at once. */
	wake(): void {
		if (this.#timer !== null || this.#abort.signal.aborted) return;
		this.#again = true;
		this.#working ??= this.#work().finally(() => {
			this.#working = null;
			if (this.#again) this.wake();
		});
	}

	/** The run has ended: sends the rest for at most `milliseconds`. Returns whether all is sent. */
	async finish(outcome: string, milliseconds: number): Promise<boolean> {
		this.#outcome = outcome;
		this.problem = null;
		const deadline = AbortSignal.timeout(milliseconds);
		const over = new Promise<void>((resolve) => void deadline.addEventListener("abort", () => resolve()));
		while (!this.#isDone() && !deadline.aborted) {
			this.#clearTimer();
			this.wake();
			await Promise.race([this.#working, over]);
			if (!this.#isDone() && !deadline.aborted) await setTimeout(Math.min(this.#pause, LAST_PAUSE));
		}
		const done = this.#isDone();
		this.close();
		return done;
	}

	/** Ends all work at once. */
	close(): void {
		this.#again = false;
		this.#clearTimer();
		this.#abort.abort();
	}

	#isDone(): boolean {
		return this.#progress.finished !== null && this.#progress.finished === this.#outcome;
	}

	#clearTimer(): void {
		if (this.#timer !== null) clearTimeout(this.#timer);
		this.#timer = null;
	}

	async #work(): Promise<void> {
		this.#again = false;
		const { signal } = this.#abort;
		try {
			for (;;) {
				const { lines, end } = await this.#next();
				if (lines.length === 0) break;
				await this.sink.send(lines, this.#progress.memory, signal);
				this.#progress.offset = end;
				this.#save();
			}
			const outcome = this.#outcome;
			if (outcome !== null && this.#progress.finished !== outcome) {
				await this.sink.finish?.(outcome, this.#progress.memory, signal);
				this.#progress.finished = outcome;
				this.#save();
			}
			this.problem = null;
			this.#pause = FIRST_PAUSE;
		} catch (error) {
			if (signal.aborted) {
				this.problem = null;
				return;
			}
			this.problem = messageOf(error);
			this.#again = false;
			this.#timer = globalThis.setTimeout(() => {
				this.#timer = null;
				this.wake();
			}, this.#pause);
			// The end of the process does not wait for a service.
			this.#timer.unref();
			this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE);
		}
	}

	/** The next whole lines that are not sent. */
	async #next(): Promise<{ lines: string[]; end: number }> {
		const { offset } = this.#progress;
		let file: FileHandle | null = null;
		try {
			file = await open(join(this.#folder, this.sink.source), "r");
			// A line may be longer than a batch.
			for (let size = BATCH_BYTES; ; size *= 4) {
				const chunk = Buffer.allocUnsafe(size);
				const { bytesRead } = await file.read(chunk, 0, size, offset);
				const end = chunk.subarray(0, bytesRead).lastIndexOf(10) + 1;
				if (end > 0) return { lines: chunk.toString("utf8", 0, end - 1).split("\n"), end: offset + end };
				if (bytesRead < size) return { lines: [], end: offset };
			}
		} catch (error) {
			if ((error as NodeJS.ErrnoException).code === "ENOENT") return { lines: [], end: offset };
			throw error;
		} finally {
			await file?.close();
		}
	}

	get #path(): string {
		return join(this.#folder, SINKS_FOLDER, `${this.sink.name}.json`);
	}

	#read(): Progress | null {
		try {
			const value = JSON.parse(readFileSync(this.#path, "utf8")) as Progress;
			return Number.isSafeInteger(value.offset) && typeof value.memory === "object" ? value : null;
		} catch {
			return null;
		}
	}

	#save(): void {
		replaceFile(this.#path, `${JSON.stringify(this.#progress)}\n`);
	}
}
