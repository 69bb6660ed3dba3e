/** What `arl doctor` finds for training on several ranks: the launcher of this process, and the `mpirun` that starts some. */
import { toArlError } from "../errors.js";
import { launchOf, launchText } from "../launch/launch.js";
import { findMpirun, INSTALL_MPI, mpiLibraries } from "../launch/mpi.js";
import type { Finding } from "./doctor-cuda.js";

/** Both findings. Neither is needed for one rank, so that neither counts as missing unless the environment contradicts itself. */
export function ranksFindings(env: Readonly<Record<string, string | undefined>> = process.env): Finding[] {
	return [launcherFinding(env), mpirunFinding(env)];
}

function launcherFinding(env: Readonly<Record<string, string | undefined>>): Finding {
	try {
		const launch = launchOf(env);
		if (launch.world === 1) return { name: "launcher", value: "none: this process would train alone", ok: true };
		const [library] = mpiLibraries(launch.launcher, env);
		return { name: "launcher", value: `${launchText(launch)}; MPI library ${library}`, ok: true };
	} catch (thrown) {
		const { message, hint } = toArlError(thrown);
		return { name: "launcher", value: message, ok: false, hint };
	}
}

function mpirunFinding({ PATH }: Readonly<Record<string, string | undefined>>): Finding {
	const mpirun = findMpirun(PATH);
	if (mpirun !== null) return { name: "mpirun", value: `${mpirun.version} (${mpirun.file})`, ok: true };
	return { name: "mpirun", value: "none: only training on several ranks needs one", ok: true, hint: INSTALL_MPI };
}
