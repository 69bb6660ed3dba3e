/**
 * SIGINT, SIGTERM and SIGHUP ask for an orderly end. A second SIGINT or SIGTERM ends the process at once; a second SIGHUP does
 * not, since closing a terminal often sends two: one from the shell, one from the system.
 */
import { EXIT_CODES } from "../errors.js";
import { STOP_SIGNAL } from "../launch/start.js";

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

/** Other ranks of a run. */
interface OtherRanks {
	/** Called when another rank gets a signal. */
	onStop: (signal: NodeJS.Signals) => void;
	/** Whether one has failed. */
	readonly hasFailed: boolean;
}

/** A launcher sends SIGTERM also where a rank was killed, which is known within this time; then nothing is saved. */
const RANKS_MILLISECONDS = 300;

/**
 * A signal that fires at the first SIGINT, SIGTERM or SIGHUP; `release` restores the process's own handling. `ranks`: others,
 * whose signals count too.
 */
export function onStopSignals(
	note: (text: string) => void,
	ranks: OtherRanks | null = null,
): { signal: AbortSignal; release(): void } {
	const controller = new AbortController();
	let asked = false;
	const handleRanks = (name: NodeJS.Signals) => {
		// A launcher sends its signal to every rank: the second one is no wish to exit without saving.
		if (asked) return;
		asked = true;
		setTimeout(() => {
			if (ranks?.hasFailed === true) return;
			note(`${name}: finishing the step on all ranks and saving`);
			controller.abort();
		}, RANKS_MILLISECONDS);
	};
	if (ranks !== null) ranks.onStop = handleRanks;
	const handle = (name: NodeJS.Signals) => {
		if (name === "SIGHUP") isHungUp = true;
		if (ranks !== null) return handleRanks(name);
		if (!controller.signal.aborted) {
			const again = name === "SIGHUP" ? "" : "; repeat to exit at once without saving";
			note(`${name}: finishing the step and saving${again}`);
			controller.abort();
		} else if (name !== "SIGHUP") process.exit(EXIT_CODES.ARL_INTERRUPTED);
	};
	const names = ranks === null ? NAMES : [...NAMES, STOP_SIGNAL];
	for (const name of names) process.on(name, handle);
	return {
		signal: controller.signal,
		release: () => {
			for (const name of names) process.off(name, handle);
		},
	};
}
