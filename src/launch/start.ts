/** Starts ranks on this machine with the `mpirun` that is installed, and ends as it ends. */
import { spawn } from "node:child_process";
import { constants } from "node:os";
import { ArlError } from "../errors.js";
import { findMpirun, INSTALL_MPI, mpirunArguments } from "./mpi.js";

/** What this process is asked to stop by: first an orderly end, then at once. */
const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

/** What asks ranks for an orderly end through Open MPI's `mpirun`, which passes it on; at SIGTERM it ends them, at once or soon. */
export const STOP_SIGNAL = "SIGUSR2";

/**
 * Runs `command` on `ranks` ranks; gives `mpirun`'s exit code.
 *
 * @throws ArlError `ARL_DEVICE` where none is installed, and on Windows.
 */
export async function startRanks(ranks: number, command: readonly string[]): Promise<number> {
	if (process.platform === "win32") {
		throw new ArlError(
			"ARL_DEVICE",
			`nproc_per_node ${ranks}: several ranks need Linux or macOS`,
			"Train with one process, or under WSL.",
		);
	}
	const mpirun = findMpirun(process.env.PATH);
	if (mpirun === null) {
		throw new ArlError(
			"ARL_DEVICE",
			`nproc_per_node ${ranks}: ranks are started by mpirun, and there is none in PATH`,
			INSTALL_MPI,
		);
	}
	const root = process.getuid?.() === 0;
	const child = spawn(mpirun.file, [...mpirunArguments(mpirun, ranks, root), ...command], {
		stdio: "inherit",
		// In a group of its own: a terminal's signals come to this process alone.
		detached: true,
	});
	let asked = false;
	const pass = (signal: NodeJS.Signals) => {
		if (asked && signal === "SIGHUP") return;
		child.kill(!asked && mpirun.kind === "Open MPI" ? STOP_SIGNAL : "SIGTERM");
		asked = true;
	};
	for (const name of SIGNALS) process.on(name, pass);
	try {
		return await new Promise<number>((resolve, reject) => {
			child.on("error", reject);
			child.on("exit", (code, signal) => resolve(code ?? 128 + constants.signals[signal ?? "SIGKILL"]));
		});
	} finally {
		for (const name of SIGNALS) process.off(name, pass);
	}
}
