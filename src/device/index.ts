/** Which device a run uses: what the option `device` means on this machine. Knows what there is of CUDA. */

import { ArlError } from "../errors.js";
import type { CudaDevice, DeviceInfo, Native } from "../native.js";
import { type CudaFinding, findCuda, openCuda } from "./cuda.js";

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
	if (wanted === "auto" && problem !== null) return onCpu(native, notUsed(finding));
	if (problem !== null) throw new ArlError("ARL_DEVICE", `device ${wanted}: ${problem.message}`, problem.hint);
	const found = pick(wanted, finding.report.devices);
	return {
		device: found.device,
		native: openCuda(native, String(finding.addon)),
		info: gpuInfo(found),
		notice: null,
	};
}

/**
 * The device that a plan is made for, as `chooseDevice` would choose it; but nothing is loaded, and `cuda` stands for a GPU
 * that is not there, too: then nothing is known of its memory.
 *
 * @throws ArlError `ARL_DEVICE` where a GPU is named by its number, and the machine has others.
 */
export function deviceToPlan(wanted: string, native: Native, find = findCuda): Omit<ChosenDevice, "native"> {
	if (wanted === "cpu") return onCpu(native, null);
	const finding = find(native);
	const { problem, report } = finding;
	if (wanted === "auto" && problem !== null) return onCpu(native, notUsed(finding));
	if (!report.devices.some((device) => device.problem === undefined)) {
		const notice = `no GPU is asked for its memory: ${problem?.message ?? "none can be used"}`;
		return { device: wanted, info: undefined, notice };
	}
	const found = pick(wanted, report.devices);
	return { device: found.device, info: gpuInfo(found), notice: null };
}

/** Why a GPU that may be there is not used; null: there is none to expect. */
function notUsed(finding: CudaFinding): string | null {
	const { problem } = finding;
	return problem === null || isPlainCpu(finding) ? null : `the GPU is not used: ${problem.message}. ${problem.hint}`;
}

function gpuInfo({ device, name, capability, memoryBytes, availableBytes }: CudaDevice): DeviceInfo {
	const features = [`compute capability ${capability}`];
	return { device, name, threads: 0, features, memoryBytes, availableBytes };
}

/** The machine's own processor and memory. */
export function hostInfo(native: Native): DeviceInfo | undefined {
	return native.devices().find(({ device }) => device === "cpu");
}

function onCpu(native: Native, notice: string | null): ChosenDevice {
	return { device: "cpu", native, info: hostInfo(native), notice };
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
