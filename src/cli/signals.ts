/** SIGINT and SIGTERM: the first asks for an orderly end, the second ends the process at once. */
import { EXIT_CODES } from "../errors.js";

const NAMES = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

/** A signal that fires at the first SIGINT, SIGTERM or SIGHUP; `release` gives the process its own handling back. */
export function onStopSignals(note: (text: string) => void): { signal: AbortSignal; release(): void } {
	const controller = new AbortController();
	const handle = (name: NodeJS.Signals) => {
		if (controller.signal.aborted) process.exit(EXIT_CODES.ARL_INTERRUPTED);
		note(`${name}: finishing the step and saving; once more to leave at once, without saving`);
		controller.abort();
	};
	for (const name of NAMES) process.on(name, handle);
	return {
		signal: controller.signal,
		release: () => {
			for (const name of NAMES) process.off(name, handle);
		},
	};
}
