/**
 * SIGINT, SIGTERM and SIGHUP ask for an orderly end. A second SIGINT or SIGTERM ends the process at once; a second SIGHUP does
 * not, since a terminal that is closed often sends two: one by the shell, one by the system.
 */
import { EXIT_CODES } from "../errors.js";

const NAMES = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

let isHungUp = false;

/** Whether the terminal was closed (SIGHUP) while such signals were handled here. */
export function hungUp(): boolean {
	return isHungUp;
}

/** A signal that fires at the first SIGINT, SIGTERM or SIGHUP; `release` gives the process its own handling back. */
export function onStopSignals(note: (text: string) => void): { signal: AbortSignal; release(): void } {
	const controller = new AbortController();
	const handle = (name: NodeJS.Signals) => {
		if (name === "SIGHUP") isHungUp = true;
		if (!controller.signal.aborted) {
			const again = name === "SIGHUP" ? "" : "; once more to leave at once, without saving";
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
