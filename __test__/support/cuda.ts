/** Machines with a GPU that are none: a driver and libraries made by the C compiler, and an environment that finds no others. */
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync } from "node:fs";
import { join } from "node:path";
import { root } from "./real.js";

export const DRIVER = "libcuda.so.1";
export const LIBRARIES = [
	"libcudart.so.13",
	"libnvrtc.so.13",
	"libcurand.so.10",
	"libcublasLt.so.13",
	"libcublas.so.13",
] as const;

/** Where fakes can be made: they are for Linux x64, as CUDA is. */
export const cudaSystem = process.platform === "linux" && process.arch === "x64";

/** A GPU as the fake driver tells it: name, compute capability, memory in GiB, and free. */
export const H100 = "NVIDIA H100,9,0,80,79,0";
export const TURING = "NVIDIA T4,7,5,16,15,0";

/** Compiles a shared library of C sources. */
export function library(file: string, soname: string, sources: string[]): void {
	const args = ["-shared", "-fPIC", "-x", "c", ...sources, `-Wl,-soname,${soname}`, "-o", file];
	execFileSync(process.env.CC ?? "cc", args, { stdio: ["ignore", "ignore", "inherit"] });
}

/** Puts the fake driver into a new folder, with further C sources, and empty libraries beside it. */
export function fakeCuda(parent: string, libraries: readonly string[] = LIBRARIES, sources: string[] = []): string {
	const folder = mkdtempSync(join(parent, "cuda-"));
	const driver = join(root, "crates", "arl-cuda-libraries", "tests", "fake", "libcuda.c");
	library(join(folder, DRIVER), DRIVER, [driver, ...sources]);
	for (const soname of libraries) library(join(folder, soname), soname, ["/dev/null"]);
	return folder;
}

/** Variables under which only the libraries in `folders` are found, and those that the system's loader knows. */
export function onlyIn(parent: string, folders: string[], more: NodeJS.ProcessEnv = {}): NodeJS.ProcessEnv {
	const home = join(parent, "home");
	mkdirSync(home, { recursive: true });
	const none = ["LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONUSERBASE"];
	return {
		...Object.fromEntries([...none, "ARL_PYTHON", "ARL_CUDA_ADDON", "XDG_CACHE_HOME"].map((name) => [name, undefined])),
		PATH: "/usr/bin:/bin",
		HOME: home,
		ARL_CACHE: join(home, "cache"),
		ARL_CUDA_LIBRARIES: folders.join(":"),
		...more,
	};
}
