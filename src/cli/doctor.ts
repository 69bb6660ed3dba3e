/** `arl doctor`: shows what this machine can do, what is missing, and what to do about it. */
import { availableParallelism, cpus, freemem, platform, release, totalmem } from "node:os";
import { findCuda } from "../device/cuda.js";
import { installedLibraries } from "../device/cuda-libraries.js";
import { toArlError } from "../errors.js";
import { type DeviceInfo, loadNative, type Native } from "../native.js";
import { bytes, jsonLine } from "../report/index.js";
import { JSON_FLAG, parseCommand, version } from "./command.js";
import { cudaFindings, type Finding } from "./doctor-cuda.js";
import { ranksFindings } from "./doctor-ranks.js";

export const COMMAND = {
	name: "arl doctor",
	usage: "[--json]",
	about: "Shows what this machine can do and what is missing. Exits with 1 if something is missing.",
	flags: { json: JSON_FLAG },
};

function systemFindings(): Finding[] {
	const [major = 0, minor = 0] = process.versions.node.split(".").map(Number);
	const nodeOk = major > 20 || (major === 20 && minor >= 19);
	return [
		{ name: "arl", value: version(), ok: true },
		{
			name: "node",
			value: process.versions.node,
			ok: nodeOk,
			...(!nodeOk && { hint: "Install Node 20.19 or newer." }),
		},
		{ name: "system", value: `${platform()} ${release()} ${process.arch}`, ok: true },
		{ name: "processor", value: cpus()[0]?.model.trim() || "unknown", ok: true },
		{ name: "threads", value: String(availableParallelism()), ok: true },
		{ name: "memory", value: `${bytes(totalmem())}, ${bytes(freemem())} free`, ok: true },
	];
}

function deviceFinding(device: DeviceInfo): Finding {
	const features =
		device.features.length > 0 ? device.features.join(", ") : "no vector instructions that the engine uses";
	return {
		name: `device ${device.device}`,
		value: `${device.name}, ${device.threads} threads, ${bytes(device.availableBytes)} of ${bytes(device.memoryBytes)} available; ${features}`,
		ok: true,
	};
}

function coreFindings(core: () => Native): Finding[] {
	try {
		const native = core();
		const devices = native.devices().map(deviceFinding);
		return [{ name: "core", value: native.version(), ok: true }, ...devices, ...cudaFindings(findCuda(native, "all"))];
	} catch (thrown) {
		const error = toArlError(thrown);
		return [{ name: "core", value: error.message, ok: false, hint: error.hint || "Build it with `npm run build`." }];
	}
}

/** What `arl cuda install` has put into arl's cache. */
async function installedFindings(core: () => Native): Promise<Finding[]> {
	const folder = await Promise.resolve()
		.then(() => installedLibraries(core()))
		.catch(() => null);
	return folder === null ? [] : [{ name: "cuda libraries", value: `ready: ${folder}`, ok: true }];
}

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const findings = [
		...systemFindings(),
		...coreFindings(core),
		...(await installedFindings(core)),
		...ranksFindings(core),
	];
	if (given.flags.json) {
		process.stdout.write(`${jsonLine(findings)}\n`);
	} else {
		const width = Math.max(...findings.map(({ name }) => name.length));
		for (const { name, value, ok, hint } of findings) {
			process.stdout.write(`${ok ? "ok     " : "missing"}  ${name.padEnd(width)}  ${value}\n`);
			for (const line of hint?.split("\n") ?? []) process.stdout.write(`${" ".repeat(11 + width)}${line}\n`);
		}
	}
	return findings.every(({ ok }) => ok) ? 0 : 1;
}
