/** The processors and GPUs of this machine. */
import { findCuda } from "../device/cuda.js";
import { loadNative } from "../native.js";

/** A device, usable or not. */
export interface Device {
	/** As the option `device` names it: `cpu`, `cuda:0`. */
	device: string;
	/** For people. */
	name: string;
	/** Of its memory, in bytes. */
	memoryBytes: number;
	/** Bytes of it that are free; 0: not known. */
	availableBytes: number;
	/** Why it cannot be used, and what to do about it; null: it can. */
	problem: { message: string; hint: string } | null;
}

/** The devices of this machine, the CPU first. Looks for GPUs in another process, which takes seconds where there is a driver. */
export function devices(): Device[] {
	const native = loadNative();
	const cpus = native.devices().map(({ device, name, memoryBytes, availableBytes }) => {
		return { device, name, memoryBytes, availableBytes, problem: null };
	});
	const { report, problem } = findCuda(native, "all");
	const gpus = report.devices.map(({ device, name, memoryBytes, availableBytes, problem: own }) => {
		const shared = problem === null ? null : { message: problem.message, hint: problem.hint };
		return { device, name, memoryBytes, availableBytes, problem: own ? { message: own, hint: "" } : shared };
	});
	return [...cpus, ...gpus];
}
