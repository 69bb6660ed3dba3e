/** What `arl doctor` says of CUDA: driver, GPUs, libraries, addon, and the first thing that is missing. */
import type { CudaFinding } from "../cuda.js";
import { isPlainCpu } from "../device.js";
import type { CudaDevice, CudaLibrary } from "../native.js";
import { bytes } from "../report/index.js";
import type { Finding } from "./doctor.js";

/** What was tried, a line each; of a library that was found, only what did not open before. */
function trials({ path, tried }: CudaLibrary): string {
	const told = path === undefined ? tried : tried.filter(({ why }) => why !== "not there");
	return told.map(({ at, why }) => (why.startsWith(at) ? why : `${at}: ${why}`)).join("\n");
}

function driverFinding(driver: CudaLibrary, { report, problem }: CudaFinding): Finding {
	const hint = trials(driver);
	const version = report.driverVersion === undefined ? "" : `CUDA up to ${report.driverVersion}, `;
	return {
		name: "cuda driver",
		value: `${version}${driver.path ?? "does not open"}`,
		ok: driver.path !== undefined && problem?.kind !== "oldDriver" && problem?.kind !== "driver",
		...(hint !== "" && { hint }),
	};
}

function deviceFinding({ device, name, capability, memoryBytes, availableBytes, problem }: CudaDevice): Finding {
	const memory = `${bytes(availableBytes)} of ${bytes(memoryBytes)} available`;
	const use = problem === undefined ? memory : `${bytes(memoryBytes)}; cannot be used: ${problem}`;
	return { name: `device ${device}`, value: `${name}, compute capability ${capability}, ${use}`, ok: true };
}

function libraryFinding(library: CudaLibrary): Finding {
	const { name, soname, path, needed } = library;
	const hint = trials(library);
	return {
		name,
		value: path ?? `${soname} was not found${needed ? "" : " (works without it)"}`,
		ok: path !== undefined || !needed,
		...(hint !== "" && { hint }),
	};
}

/** All there is to say of CUDA. No GPU, or none that can be used, is no failure: the CPU is there. */
export function cudaFindings(finding: CudaFinding): Finding[] {
	const { report, addon, problem } = finding;
	if (problem !== null && isPlainCpu(finding)) {
		return [{ name: "cuda", value: `${problem.message}: runs on the CPU`, ok: true }];
	}
	const addonFails = problem?.kind === "noAddon" || problem?.kind === "addon";
	const verdict =
		problem === null ? "can be used: `--device auto` takes it" : `${problem.message}: runs on the CPU without it`;
	return [
		...(report.driver === undefined ? [] : [driverFinding(report.driver, finding)]),
		...report.devices.map(deviceFinding),
		...report.libraries.map(libraryFinding),
		{ name: "cuda addon", value: addon ?? "not there", ok: !addonFails },
		{
			name: "cuda",
			value: verdict,
			ok: problem === null || problem.kind === "noGpu",
			...(problem !== null && { hint: problem.hint }),
		},
	];
}
