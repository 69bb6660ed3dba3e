/**
 * Finds what CUDA needs: the driver, NVIDIA's libraries, the GPUs and the addon for them. A process of its own tries
 * everything first (`probe.ts`). Knows the addon, and nothing of runs.
 */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { ADDON_LOADER, type CudaReport, loadCudaNative, type Native, PACKAGE_FOLDER } from "../native.js";
import type { ProbeResult } from "./probe.js";

/** Why CUDA cannot be used, and what to do about it. */
export interface CudaProblem {
	kind: NonNullable<CudaReport["problem"]>["kind"] | "crash" | "noAddon" | "addon" | "engine";
	message: string;
	hint: string;
}

/** The state of CUDA on this machine. */
export interface CudaFinding {
	report: CudaReport;
	/** The CUDA addon's file; null: not installed. */
	addon: string | null;
	/** The first problem that keeps CUDA from being used; null: CUDA can be used. */
	problem: CudaProblem | null;
}

/** The npm package that the CUDA addon may come in, named after this one. */
function addonPackage(): string {
	const { name, napi } = JSON.parse(readFileSync(join(PACKAGE_FOLDER, "package.json"), "utf8"));
	return `${napi?.packageName ?? name}-linux-x64-gnu-cuda`;
}

/** How long the probe may take; a driver that hangs must not hang every run. */
const PROBE_MS = 60_000;

/** The probe as Node runs it: compiled, also where this module is not (in tests). */
const PROBE = join(PACKAGE_FOLDER, "dist", "device", "probe.js");

/** The CUDA addon's file: the one that ARL_CUDA_ADDON names, the one next to the CPU addon, or that of the npm package. */
function addonFile(): string | null {
	const named = process.env.ARL_CUDA_ADDON;
	if (named) return named;
	const built = join(PACKAGE_FOLDER, "arl.linux-x64-gnu-cuda.node");
	if (existsSync(built)) return built;
	try {
		return createRequire(import.meta.url).resolve(addonPackage());
	} catch {
		return null;
	}
}

/** Every `node_modules` folder that may hold the package. */
function moduleFolders(): string[] {
	const folders: string[] = [];
	for (let folder = PACKAGE_FOLDER; dirname(folder) !== folder; folder = dirname(folder)) {
		folders.push(join(folder, "node_modules"));
	}
	return folders;
}

/** Runs the probe. `end`: how its process ended, if not by itself. */
function probe(addon: string | null, device: string): ProbeResult & { end?: string } {
	const { status, signal, error, stderr, output } = spawnSync(
		process.execPath,
		[PROBE, ADDON_LOADER, addon ?? "", device, ...moduleFolders()],
		{ encoding: "utf8", stdio: ["ignore", "ignore", "pipe", "pipe"], timeout: PROBE_MS },
	);
	const lines = (output?.[3] ?? "").split("\n").filter(Boolean);
	const found: ProbeResult = Object.assign({}, ...lines.map((line) => JSON.parse(line)));
	if (status === 0) return found;
	const slow = error !== undefined && "code" in error && error.code === "ETIMEDOUT";
	const how = slow ? `no answer in ${PROBE_MS / 1000} s` : (signal ?? error?.message ?? `exit code ${status}`);
	const last = stderr?.trim().split("\n").at(-1);
	return { ...found, end: last ? `${how}: ${last}` : how };
}

const NOTHING: CudaReport = { devices: [], libraries: [] };

function addonProblem(addon: string | null, found: ReturnType<typeof probe>, native: Native): CudaProblem | null {
	const clone = existsSync(join(PACKAGE_FOLDER, "Cargo.toml"));
	const hint = clone ? "Run `npm run build:cuda`." : `Run \`npm install ${addonPackage()}@${native.version()}\`.`;
	if (addon === null) return { kind: "noAddon", message: "the CUDA addon is not installed", hint };
	if (found.end !== undefined) {
		return { kind: "addon", message: `the CUDA addon ends the process that loads it (${found.end}): ${addon}`, hint };
	}
	if (found.addon === undefined) {
		return { kind: "addon", message: `the CUDA addon cannot be loaded: ${found.failure}`, hint };
	}
	if (found.addon.version !== native.version()) {
		const message = `the CUDA addon has version ${found.addon.version}, but this is arl ${native.version()}: ${addon}`;
		return { kind: "addon", message, hint };
	}
	if (!found.addon.backends.includes("cuda")) {
		const message = `the CUDA addon's engine runs on ${found.addon.backends.join(", ")} only: ${addon}`;
		return { kind: "engine", message, hint: "Use the CPU (`--device cpu`)." };
	}
	return null;
}

/**
 * Finds the state of CUDA. Quick without a driver; with one it starts a process, which initializes the driver. `device`, as
 * the option names it, or `all`: the GPU whose free memory is asked for.
 */
export function findCuda(native: Native, device: string): CudaFinding {
	const addon = addonFile();
	if (!native.cudaDriver()?.path) {
		const report = native.cudaReport([]);
		return { report, addon, problem: report.problem ?? null };
	}
	const found = probe(addon, device);
	if (found.report === undefined) {
		const message = `the NVIDIA driver or a CUDA library ends the process that opens it (${found.end})`;
		const hint = "Run `nvidia-smi`; reinstall NVIDIA's driver, or use the CPU (`--device cpu`).";
		return { report: NOTHING, addon, problem: { kind: "crash", message, hint } };
	}
	const problem = found.report.problem ?? addonProblem(addon, found, native);
	return { report: found.report, addon, problem };
}

/** Loads the CUDA addon that `findCuda` found usable, into this process. */
export function openCuda(native: Native, addon: string): Native {
	native.cudaReport(moduleFolders()); // Opens the libraries that the addon needs.
	return loadCudaNative(addon);
}
