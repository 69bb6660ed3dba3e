/**
 * What there is of CUDA: the driver, NVIDIA's libraries, the GPUs and the addon for them. Everything is tried in a process of
 * its own first, because a bad native library can end the process that opens it. Knows the addon, and nothing of runs.
 */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { ADDON_LOADER, type CudaReport, loadCudaNative, type Native, PACKAGE_FOLDER } from "../native.js";

/** What keeps CUDA from being used, and what to do about it. */
export interface CudaProblem {
	kind: NonNullable<CudaReport["problem"]>["kind"] | "crash" | "noAddon" | "addon" | "engine";
	message: string;
	hint: string;
}

/** What there is of CUDA. */
export interface CudaFinding {
	report: CudaReport;
	/** The CUDA addon's file; null: there is none. */
	addon: string | null;
	/** The first thing that keeps CUDA from being used; null: nothing does. */
	problem: CudaProblem | null;
}

/** The npm package that the CUDA addon may come in. */
const ADDON_PACKAGE = "arl-linux-x64-gnu-cuda";

/** How long the trial may take; a driver that hangs must not hang every run. */
const TRIAL_MS = 60_000;

/** What the trial runs: finds and opens everything, loads the CUDA addon if nothing is missing, tells each in a line. */
const TRIAL = `
const { writeSync } = require("node:fs");
const [core, cuda, ...beside] = process.argv.slice(1);
const tell = (found) => writeSync(3, JSON.stringify(found) + "\\n");
const report = require(core).cudaReport(beside);
tell({ report });
if (cuda && !report.problem) {
	try {
		const addon = require(cuda);
		tell({ addon: { version: addon.version(), backends: addon.backends() } });
	} catch (error) {
		tell({ failure: error.message });
	}
}`;

interface Told {
	report?: CudaReport;
	addon?: { version: string; backends: string[] };
	failure?: string;
	/** How the process ended where it did not end by itself. */
	end?: string;
}

/** The CUDA addon's file: the one that ARL_CUDA_ADDON names, the one beside the other, or that of the npm package. */
function addonFile(): string | null {
	const named = process.env.ARL_CUDA_ADDON;
	if (named) return named;
	const beside = join(PACKAGE_FOLDER, "arl.linux-x64-gnu-cuda.node");
	if (existsSync(beside)) return beside;
	try {
		return createRequire(import.meta.url).resolve(ADDON_PACKAGE);
	} catch {
		return null;
	}
}

/** Every `node_modules` that the package may have been installed in. */
function moduleFolders(): string[] {
	const folders: string[] = [];
	for (let folder = PACKAGE_FOLDER; dirname(folder) !== folder; folder = dirname(folder)) {
		folders.push(join(folder, "node_modules"));
	}
	return folders;
}

function trial(addon: string | null): Told {
	const { status, signal, error, stderr, output } = spawnSync(
		process.execPath,
		["-e", TRIAL, ADDON_LOADER, addon ?? "", ...moduleFolders()],
		{ encoding: "utf8", stdio: ["ignore", "ignore", "pipe", "pipe"], timeout: TRIAL_MS },
	);
	const told: Told = {};
	for (const line of (output?.[3] ?? "").split("\n").filter(Boolean)) Object.assign(told, JSON.parse(line));
	if (status !== 0) {
		const slow = error !== undefined && "code" in error && error.code === "ETIMEDOUT";
		const how = slow ? `no answer in ${TRIAL_MS / 1000} s` : (signal ?? error?.message ?? `exit code ${status}`);
		const last = stderr?.trim().split("\n").at(-1);
		told.end = last ? `${how}: ${last}` : how;
	}
	return told;
}

const NOTHING: CudaReport = { devices: [], libraries: [] };

function addonProblem(addon: string | null, told: Told, native: Native): CudaProblem | null {
	const clone = existsSync(join(PACKAGE_FOLDER, "Cargo.toml"));
	const hint = clone ? "Run `npm run build:cuda`." : `Run \`npm install ${ADDON_PACKAGE}@${native.version()}\`.`;
	if (addon === null) return { kind: "noAddon", message: "the CUDA addon is not installed", hint };
	if (told.end !== undefined) {
		return { kind: "addon", message: `the CUDA addon ends the process that loads it (${told.end}): ${addon}`, hint };
	}
	if (told.addon === undefined) {
		return { kind: "addon", message: `the CUDA addon cannot be loaded: ${told.failure}`, hint };
	}
	if (told.addon.version !== native.version()) {
		const message = `the CUDA addon is of version ${told.addon.version}, and ${native.version()} is needed: ${addon}`;
		return { kind: "addon", message, hint };
	}
	if (!told.addon.backends.includes("cuda")) {
		const message = `the CUDA addon's engine runs on ${told.addon.backends.join(", ")} only: ${addon}`;
		return { kind: "engine", message, hint: "Use the CPU (`--device cpu`)." };
	}
	return null;
}

/** Finds out what there is of CUDA. Quick where there is no driver; else it takes a process and the driver's start. */
export function findCuda(native: Native): CudaFinding {
	const addon = addonFile();
	if (!native.cudaDriver()?.path) {
		const report = native.cudaReport([]);
		return { report, addon, problem: report.problem ?? null };
	}
	const told = trial(addon);
	if (told.report === undefined) {
		const message = `the NVIDIA driver or a CUDA library ends the process that opens it (${told.end})`;
		const hint = "Look at `nvidia-smi`; install NVIDIA's driver again, or use the CPU (`--device cpu`).";
		return { report: NOTHING, addon, problem: { kind: "crash", message, hint } };
	}
	const problem = told.report.problem ?? addonProblem(addon, told, native);
	return { report: told.report, addon, problem };
}

/** Loads the CUDA addon that `findCuda` found usable, into this process. */
export function openCuda(native: Native, addon: string): Native {
	native.cudaReport(moduleFolders()); // opens the libraries that the addon asks for
	return loadCudaNative(addon);
}
