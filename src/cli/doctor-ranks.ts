/** What `arl doctor` finds for training on several ranks: the launcher of this process, what starts some, and NCCL. */
import { toArlError } from "../errors.js";
import { launchOf, launchText } from "../launch/launch.js";
import { findMpirun, INSTALL_MPI, mpiLibraries } from "../launch/mpi.js";
import { findTorchrun } from "../launch/torchrun.js";
import type { Native } from "../native.js";
import type { Finding } from "./doctor-cuda.js";

type Environment = Readonly<Record<string, string | undefined>>;

/** All findings. None is needed for one rank, so that none counts as missing unless the environment contradicts itself. */
export function ranksFindings(
	core: () => Native,
	env: Environment = process.env,
	system: NodeJS.Platform = process.platform,
): Finding[] {
	// No program that could be installed would help there.
	if (system === "win32") return [{ name: "ranks", value: "one: several need Linux or macOS (or WSL)", ok: true }];
	return [launcherFinding(env), mpirunFinding(env), torchrunFinding(env), ...ncclFindings(core)];
}

function launcherFinding(env: Environment): Finding {
	try {
		const launch = launchOf(env);
		if (launch.world === 1) return { name: "launcher", value: "none: this process would train alone", ok: true };
		const [library] = mpiLibraries(launch.launcher, env);
		const mpi = launch.store.kind === "mpi" ? `; MPI library ${library}` : "";
		return { name: "launcher", value: `${launchText(launch)}${mpi}`, ok: true };
	} catch (thrown) {
		const { message, hint } = toArlError(thrown);
		return { name: "launcher", value: message, ok: false, hint };
	}
}

function mpirunFinding({ PATH }: Environment): Finding {
	const mpirun = findMpirun(PATH);
	if (mpirun !== null) return { name: "mpirun", value: `${mpirun.version} (${mpirun.file})`, ok: true };
	return { name: "mpirun", value: "none: only training on several ranks needs one", ok: true, hint: INSTALL_MPI };
}

function torchrunFinding({ PATH }: Environment): Finding {
	return { name: "torchrun", value: findTorchrun(PATH) ?? "none: mpirun starts ranks on GPUs as well", ok: true };
}

/** NCCL, which is opened for this. */
function ncclFindings(core: () => Native): Finding[] {
	let report: ReturnType<Native["ncclReport"]>;
	try {
		report = core().ncclReport();
	} catch {
		// Without a core all of it is missing, which another finding says.
		return [];
	}
	const { found, tried, hint } = report;
	if (found !== undefined) return [{ name: "NCCL", value: found, ok: true }];
	const failed = tried.filter(({ why }) => why !== "not there").map(({ at, why }) => `${at}: ${why}`);
	const value = "none: only training on several GPUs needs it";
	return [{ name: "NCCL", value, ok: true, hint: [...failed, `To get it: ${hint}.`].join("\n") }];
}
