/** Which device a run uses: what the option `device` means on this machine. Knows what there is of CUDA. */
import { type CudaFinding, findCuda, openCuda } from "./cuda.js";
import { ArlError } from "./errors.js";
import type { CudaDevice, DeviceInfo, Native } from "./native.js";

/** A device that a run can use. */
export interface ChosenDevice {
	/** As the engine names it: `cpu`, `cuda:0`. */
	device: string;
	/** The addon whose engine runs on it. */
	native: Native;
	/** What is known of it. */
	info: DeviceInfo | undefined;
	/** Why it is not the one that might be expected; null: it is. */
	notice: string | null;
}

/** Problems that mean no more than that there is no NVIDIA GPU to expect. */
export function isPlainCpu(finding: CudaFinding): boolean {
	return finding.problem?.kind === "noDriver" || finding.problem?.kind === "system";
}

/**
 * The device that `wanted` (`auto`, `cpu`, `cuda`, `cuda:N`) means here; `auto` is CUDA where it can be used.
 *
 * @throws ArlError `ARL_DEVICE` where CUDA is asked for and cannot be used.
 */
export function chooseDevice(wanted: string, native: Native, find = findCuda): ChosenDevice {
	if (wanted === "cpu") return onCpu(native, null);
	const finding = find(native);
	const { problem } = finding;
	if (wanted === "auto" && problem !== null) {
		const notice = isPlainCpu(finding) ? null : `the GPU is not used: ${problem.message}. ${problem.hint}`;
		return onCpu(native, notice);
	}
	if (problem !== null) throw new ArlError("ARL_DEVICE", `device ${wanted}: ${problem.message}`, problem.hint);
	const found = pick(wanted, finding.report.devices);
	return {
		device: found.device,
		native: openCuda(native, String(finding.addon)),
		info: {
			device: found.device,
			name: found.name,
			threads: 0,
			features: [`compute capability ${found.capability}`],
			memoryBytes: found.memoryBytes,
			availableBytes: found.availableBytes,
		},
		notice: null,
	};
}

function onCpu(native: Native, notice: string | null): ChosenDevice {
	const info = native.devices().find(({ device }) => device === "cpu");
	return { device: "cpu", native, info, notice };
}

/** The GPU that is meant: the one named, else the first that can be used. */
function pick(wanted: string, devices: readonly CudaDevice[]): CudaDevice {
	const named = /^cuda:\d+$/.test(wanted);
	const found = devices.find(({ device, problem }) => (named ? device === wanted : problem === undefined));
	const usable = devices.filter(({ problem }) => problem === undefined).map(({ device }) => device);
	const hint = `What can be used: ${[...usable, "cpu"].join(", ")}.`;
	if (found === undefined) throw new ArlError("ARL_DEVICE", `device ${wanted}: there is no such GPU`, hint);
	if (found.problem !== undefined) {
		throw new ArlError("ARL_DEVICE", `device ${wanted} (${found.name}): ${found.problem}`, hint);
	}
	return found;
}
