/** Which device a run uses: what the option `device` means on this machine. */
import { ArlError } from "../errors.js";
import type { CudaDevice, DeviceInfo, Native } from "../native.js";
import { type CudaFinding, findCuda, openCuda } from "./cuda.js";

/** A device that a run can use. */
export interface ChosenDevice {
	/** As the engine names it: `cpu`, `cuda:0`. */
	device: string;
	/** The addon whose engine runs on it. */
	native: Native;
	/** Its name and memory; undefined: unknown. */
	info: DeviceInfo | undefined;
	/** Why it is not the device that the user may expect, or what changes its results; null: neither. */
	notice: string | null;
}

/** Whether the only problem is that the machine has no NVIDIA GPU. */
export function isPlainCpu(finding: CudaFinding): boolean {
	return finding.problem?.kind === "noDriver" || finding.problem?.kind === "system";
}

/**
 * Resolves `wanted` (`auto`, `cpu`, `cuda`, `cuda:N`) on this machine; `auto` is CUDA if it can be used, else the CPU.
 *
 * @throws ArlError `ARL_DEVICE` if `wanted` names CUDA and CUDA cannot be used.
 */
export function chooseDevice(wanted: string, native: Native, find = findCuda): ChosenDevice {
	if (wanted === "cpu") return onCpu(native, null);
	const finding = find(native, wanted);
	const { problem } = finding;
	if (wanted === "auto" && problem !== null) return onCpu(native, notUsed(finding));
	if (problem !== null) throw new ArlError("ARL_DEVICE", `device ${wanted}: ${problem.message}`, problem.hint);
	const found = pick(wanted, finding.report.devices);
	return {
		device: found.device,
		native: openCuda(native, String(finding.addon)),
		info: gpuInfo(found),
		notice: finding.report.warning ?? null,
	};
}

/**
 * Resolves `wanted` for a memory plan, as `chooseDevice` does, but loads nothing. On a machine without a usable GPU `cuda`
 * is a GPU of unknown memory.
 *
 * @throws ArlError `ARL_DEVICE` if `wanted` names a GPU by its number, and the machine has others only.
 */
export function deviceToPlan(wanted: string, native: Native, find = findCuda): Omit<ChosenDevice, "native"> {
	if (wanted === "cpu") return onCpu(native, null);
	const finding = find(native, wanted);
	const { problem, report } = finding;
	if (wanted === "auto" && problem !== null) return onCpu(native, notUsed(finding));
	if (!report.devices.some((device) => device.problem === undefined)) {
		const notice = `the memory of the GPU is unknown: ${problem?.message ?? "no GPU can be used"}`;
		return { device: wanted, info: undefined, notice };
	}
	const found = pick(wanted, report.devices);
	return { device: found.device, info: gpuInfo(found), notice: null };
}

/** Why the GPU is not used; null: the machine has none. */
function notUsed(finding: CudaFinding): string | null {
	const { problem } = finding;
	return problem === null || isPlainCpu(finding) ? null : `the GPU is not used: ${problem.message}. ${problem.hint}`;
}

function gpuInfo({ device, name, capability, memoryBytes, availableBytes }: CudaDevice): DeviceInfo {
	const features = [`compute capability ${capability}`];
	return { device, name, threads: 0, features, memoryBytes, availableBytes };
}

/** This machine's processor and memory. */
export function hostInfo(native: Native): DeviceInfo | undefined {
	return native.devices().find(({ device }) => device === "cpu");
}

function onCpu(native: Native, notice: string | null): ChosenDevice {
	return { device: "cpu", native, info: hostInfo(native), notice };
}

/** The GPU that `wanted` names, else the first usable one. */
function pick(wanted: string, devices: readonly CudaDevice[]): CudaDevice {
	const named = /^cuda:\d+$/.test(wanted);
	const found = devices.find(({ device, problem }) => (named ? device === wanted : problem === undefined));
	const usable = devices.filter(({ problem }) => problem === undefined).map(({ device }) => device);
	const hint = `Usable devices: ${[...usable, "cpu"].join(", ")}.`;
	if (found === undefined) throw new ArlError("ARL_DEVICE", `device ${wanted}: there is no such GPU`, hint);
	if (found.problem !== undefined) {
		throw new ArlError("ARL_DEVICE", `device ${wanted} (${found.name}): ${found.problem}`, hint);
	}
	return found;
}
