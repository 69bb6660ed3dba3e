/**
 * SIGINT, SIGTERM and SIGHUP ask for an orderly end. A second SIGINT or SIGTERM ends the process at once; a second SIGHUP does
 * not, since closing a terminal often sends two: one from the shell, one from the system.
 */
import { EXIT_CODES } from "../errors.js";

const NAMES = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

let isHungUp = false;

/** Whether the terminal was closed (SIGHUP) while this module handled signals. */
export function hungUp(): boolean {
	return isHungUp;
}

/**
 * Runs `work` with a signal that fires at the first SIGINT, SIGTERM or SIGHUP, for commands that save nothing; gives the exit
 * code: that of an interruption if the signal ended the work.
 */
export async function stoppable(work: (signal: AbortSignal) => Promise<number>): Promise<number> {
	const stop = onStopSignals(() => process.stderr.write("stopping\n"));
	try {
		return await work(stop.signal);
	} catch (error) {
		if (stop.signal.aborted) return EXIT_CODES.ARL_INTERRUPTED;
		throw error;
	} finally {
		stop.release();
	}
}

/** A signal that fires at the first SIGINT, SIGTERM or SIGHUP; `release` restores the process's own handling. */
export function onStopSignals(note: (text: string) => void): { signal: AbortSignal; release(): void } {
	const controller = new AbortController();
	const handle = (name: NodeJS.Signals) => {
		if (name === "SIGHUP") isHungUp = true;
		if (!controller.signal.aborted) {
			const again = name === "SIGHUP" ? "" : "; repeat to exit at once without saving";
			note(`${name}: finishing the step and saving${again}`);
			controller.abort();
		} else if (name !== "SIGHUP") process.exit(EXIT_CODES.ARL_INTERRUPTED);
	};
	for (const name of NAMES) process.on(name, handle);
	return {
		signal: controller.signal,
		release: () => {
			for (const name of NAMES) process.off(name, handle);
		},
	};
}
