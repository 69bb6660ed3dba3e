/** Runs of several ranks under a real `mpirun`. */
import { spawn } from "node:child_process";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { delimiter, dirname, join } from "node:path";
import { findMpirun, type Mpirun, mpirunArguments } from "../../src/launch/mpi.js";
import { type Ended, root } from "./real.js";

/** The launchers of the tests: those that `ARL_TEST_MPIRUN` names, as `npm test` does, else the one that is installed. */
export function mpiruns(): Mpirun[] {
	const named = process.env.ARL_TEST_MPIRUN?.split(delimiter) ?? [];
	const found = named.map((file) => findMpirun(dirname(file))).filter((mpirun) => mpirun !== null);
	if (found.length > 0) return found;
	const installed = findMpirun(process.env.PATH);
	if (installed === null) {
		process.stderr.write("SKIPPED: runs of several ranks: there is no mpirun (`node scripts/mpi.mjs` fetches two)\n");
	}
	return installed === null ? [] : [installed];
}

/** A library of `mpirun`'s own MPI; null: it is where only the system's loader finds it. */
export function libraryOf(mpirun: Mpirun): string | null {
	const names = ["libmpi.so.40", "libmpi_abi.so.1", "libmpi.so.12"];
	return names.map((name) => join(dirname(mpirun.file), "..", "lib", name)).find(existsSync) ?? null;
}

export interface RankedOptions {
	env?: NodeJS.ProcessEnv;
	/** Called with all that ranks have written to stderr so far, whenever there is more, and the started process. */
	during?: (stderr: string, pid: number) => void;
	/** Further words of one rank, by its number. */
	words?: Record<number, string>;
	/** What the shell does first that starts one rank, by its number. */
	before?: Record<number, string>;
}

/**
 * `arl` with `args` on `ranks` ranks. On a machine that is very busy Open MPI's own processes may not reach each other in time, so that
 * MPI does not start; such a run has done nothing yet, and is made again, once.
 */
export async function arlOnRanks(
	mpirun: Mpirun,
	ranks: number,
	args: string[],
	options: RankedOptions = {},
): Promise<Ended> {
	const run = await oneRun(mpirun, ranks, args, options);
	const unreached = /PMIX_ERR_UNREACH/.test(run.stderr) && /not all of \d+ ranks have started/.test(run.stderr);
	return unreached ? oneRun(mpirun, ranks, args, options) : run;
}

function oneRun(mpirun: Mpirun, ranks: number, args: string[], options: RankedOptions): Promise<Ended> {
	const command = [process.execPath, join(root, "dist", "cli", "main.js"), ...args];
	const { words = {}, before = {} } = options;
	const different = Object.keys({ ...words, ...before }).map(Number);
	const cases = different.map((rank) => `${rank}) ${before[rank] ?? ":"}; exec "$@" ${words[rank] ?? ""} ;;`);
	const byRank = [
		"sh",
		"-c",
		`case \${OMPI_COMM_WORLD_RANK:-$PMI_RANK} in ${cases.join(" ")} *) exec "$@" ;; esac`,
		"sh",
	];
	return ended(
		mpirun.file,
		[...mpirunArguments(mpirun, ranks, process.getuid?.() === 0), ...(cases.length > 0 ? byRank : []), ...command],
		options.env ?? {},
		options.during,
	);
}

/** A program and how it ended. */
export function ended(
	program: string,
	args: string[],
	env: NodeJS.ProcessEnv,
	during: RankedOptions["during"] = () => {},
): Promise<Ended> {
	const child = spawn(program, args, {
		cwd: root,
		stdio: ["ignore", "pipe", "pipe"],
		// One thread a rank: two cores serve all of them.
		env: { ...process.env, NO_COLOR: "1", ...env },
	});
	let stdout = "";
	let stderr = "";
	child.stdout.setEncoding("utf8").on("data", (chunk) => {
		stdout += chunk;
	});
	child.stderr.setEncoding("utf8").on("data", (chunk) => {
		stderr += chunk;
		during(stderr, child.pid ?? 0);
	});
	return new Promise((resolve) => {
		child.on("close", (code, signal) => resolve({ code, signal, stdout, stderr }));
	});
}

/** The ranks of a run, by its output folder. */
export function pidsOf(out: string): number[] {
	return readdirSync("/proc")
		.filter((name) => /^\d+$/.test(name))
		.filter((pid) => {
			try {
				const words = readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0");
				return words.includes(out) && /node[^/]*$/.test(words[0] ?? "") && existsSync(`/proc/${pid}/fd`);
			} catch {
				return false;
			}
		})
		.map(Number);
}

/** The rank that a process is. */
export function rankOf(pid: number): string {
	const variables = readFileSync(`/proc/${pid}/environ`, "utf8").split("\0");
	const found = variables.find((text) => /^(OMPI_COMM_WORLD_RANK|PMI_RANK)=/.test(text));
	return found?.split("=")[1] ?? "";
}
