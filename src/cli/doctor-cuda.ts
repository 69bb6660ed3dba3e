/** The part of `arl doctor` on CUDA: driver, GPUs, libraries, addon, and the first problem. */
import type { CudaFinding } from "../device/cuda.js";
import { isPlainCpu } from "../device/index.js";
import type { CudaDevice, CudaLibrary } from "../native.js";
import { bytes } from "../report/index.js";

/** One line of the report of `arl doctor`. */
export interface Finding {
	name: string;
	value: string;
	ok: boolean;
	/** What to do, or what was tried, in lines. */
	hint?: string;
}

/** Why a file did not open, in the words of the CUDA report, if it does not exist. */
const NOT_THERE = "not there";

/** The files that exist and do not open, a line each. */
function failures({ tried }: CudaLibrary): { hint?: string } {
	const failed = tried.filter(({ why }) => why !== NOT_THERE);
	const lines = failed.map(({ at, why }) => (why.startsWith(at) ? why : `${at}: ${why}`));
	return lines.length > 0 ? { hint: lines.join("\n") } : {};
}

function driverFinding(driver: CudaLibrary, { report, problem }: CudaFinding): Finding {
	const version = report.driverVersion === undefined ? "" : `CUDA up to ${report.driverVersion}, `;
	return {
		name: "cuda driver",
		value: `${version}${driver.path ?? "does not open"}`,
		ok: driver.path !== undefined && problem?.kind !== "oldDriver" && problem?.kind !== "driver",
		...failures(driver),
	};
}

function deviceFinding({ device, name, capability, memoryBytes, availableBytes, problem }: CudaDevice): Finding {
	const memory = `${bytes(availableBytes)} of ${bytes(memoryBytes)} available`;
	const use = problem === undefined ? memory : `${bytes(memoryBytes)}; cannot be used: ${problem}`;
	return { name: `device ${device}`, value: `${name}, compute capability ${capability}, ${use}`, ok: true };
}

function libraryFinding(library: CudaLibrary): Finding {
	const { name, soname, path, needed } = library;
	return {
		name,
		value: path ?? `${soname} was not found${needed ? "" : ": attention runs on arl's own kernels"}`,
		ok: path !== undefined || !needed,
		...failures(library),
	};
}

/** The places that were searched for missing libraries, once for all of them. */
function searched(libraries: readonly CudaLibrary[]): Finding[] {
	const missing = libraries.filter(({ path }) => path === undefined);
	const places = new Set(
		missing.flatMap(({ tried }) => tried.filter(({ why }) => why === NOT_THERE).map(({ at }) => at)),
	);
	if (places.size === 0) return [];
	return [
		{ name: "looked in", value: `${places.size} places, in this order:`, ok: true, hint: [...places].join("\n") },
	];
}

/** All findings on CUDA. A machine without a usable GPU is no failure, since it runs on the CPU. */
export function cudaFindings(finding: CudaFinding): Finding[] {
	const { report, addon, problem } = finding;
	if (problem !== null && isPlainCpu(finding)) {
		const installed = addon === null ? [] : [{ name: "cuda addon", value: addon, ok: true }];
		return [{ name: "cuda", value: `${problem.message}: runs on the CPU`, ok: true }, ...installed];
	}
	const noGpu = problem?.kind === "noGpu";
	const verdict: Finding = {
		name: "cuda",
		value: problem === null ? "can be used" : `not used: ${problem.message}`,
		ok: problem === null || noGpu,
		...(problem !== null && { hint: problem.hint }),
	};
	const driver = report.driver === undefined ? [] : [driverFinding(report.driver, finding)];
	const devices = report.devices.map(deviceFinding);
	if (noGpu) return [...driver, ...devices, verdict];
	const { warning } = report;
	return [
		...driver,
		...devices,
		...report.libraries.map(libraryFinding),
		...searched(report.libraries),
		{ name: "cuda addon", value: addon ?? "not installed", ok: addon !== null && problem?.kind !== "addon" },
		...(warning === undefined ? [] : [{ name: "cuda results", value: warning, ok: true }]),
		verdict,
	];
}
