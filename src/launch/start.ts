/** Starts ranks on this machine with the launcher that is installed, and ends as it ends. */
import { spawn } from "node:child_process";
import { constants } from "node:os";
import { ArlError } from "../errors.js";
import { findMpirun, INSTALL_MPI, mpirunArguments } from "./mpi.js";
import { findTorchrun, torchrunArguments } from "./torchrun.js";

/** What this process is asked to stop by: first an orderly end, then at once. */
const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

/** What asks ranks for an orderly end through Open MPI's `mpirun`, which passes it on; at SIGTERM it ends them, at once or soon. */
export const STOP_SIGNAL = "SIGUSR2";

/** A program that starts ranks. */
export interface Starter {
	file: string;
	/** Before the command that each rank runs. */
	args: string[];
	/** What asks it for an orderly end. */
	stopSignal: NodeJS.Signals;
}

/**
 * What starts `ranks` ranks on this machine: on GPUs torchrun, else `mpirun`.
 *
 * @throws ArlError `ARL_DEVICE` where none is installed, and on Windows.
 */
export function starter(ranks: number, gpus: boolean, path: string | undefined = process.env.PATH): Starter {
	if (process.platform === "win32") {
		throw new ArlError(
			"ARL_DEVICE",
			`nproc_per_node ${ranks}: several ranks need Linux or macOS`,
			"Train with one process, or under WSL.",
		);
	}
	const torchrun = gpus ? findTorchrun(path) : null;
	if (torchrun !== null) return { file: torchrun, args: torchrunArguments(ranks), stopSignal: "SIGTERM" };
	const mpirun = findMpirun(path);
	if (mpirun !== null) {
		const args = mpirunArguments(mpirun, ranks, process.getuid?.() === 0);
		return { file: mpirun.file, args, stopSignal: mpirun.kind === "Open MPI" ? STOP_SIGNAL : "SIGTERM" };
	}
	const missing = gpus ? "torchrun or mpirun, and neither is in PATH" : "mpirun, and there is none in PATH";
	throw new ArlError(
		"ARL_DEVICE",
		`nproc_per_node ${ranks}: ranks are started by ${missing}`,
		gpus ? `${INSTALL_MPI} torchrun comes with torch.` : INSTALL_MPI,
	);
}

/** Runs `command` on as many ranks as the starter starts; gives its exit code. */
export async function startRanks(started: Starter, command: readonly string[]): Promise<number> {
	const child = spawn(started.file, [...started.args, ...command], {
		stdio: "inherit",
		// In a group of its own: a terminal's signals come to this process alone.
		detached: true,
	});
	let asked = false;
	const pass = (signal: NodeJS.Signals) => {
		if (asked && signal === "SIGHUP") return;
		child.kill(asked ? "SIGTERM" : started.stopSignal);
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
