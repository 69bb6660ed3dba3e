/** What is said next to the events, as JSON lines for machines (with `--json`). */
import pino from "pino";
import type { ArlError } from "../errors.js";
import type { TrainEvent } from "../events.js";
import type { Reporter } from "./reporter.js";

/** Notes and errors as JSON lines on stderr; events are not its business. */
export class LogReporter implements Reporter {
	readonly #log = pino(
		{ base: null, timestamp: pino.stdTimeFunctions.isoTime },
		pino.destination({ fd: 2, sync: true }),
	);

	event(_event: TrainEvent): void {}

	note(text: string): void {
		this.#log.info(text);
	}

	error(error: ArlError): void {
		const trace = process.env.ARL_DEBUG ? { stack: error.stack } : {};
		const { code, hint, exitCode, message } = error;
		this.#log.error({ code, hint, exitCode, ...trace }, message);
	}

	close(): void {
		this.#log.flush();
	}
}
