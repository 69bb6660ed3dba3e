/** Machines with a GPU that are none: a driver and libraries made by the C compiler, and an environment that finds no others. */
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
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

/** Puts the fake driver into a new folder, with further C sources, and empty libraries next to it. */
export function fakeCuda(parent: string, libraries: readonly string[] = LIBRARIES, sources: string[] = []): string {
	const folder = mkdtempSync(join(parent, "cuda-"));
	const driver = join(root, "crates", "arl-cuda-libraries", "tests", "fake", "libcuda.c");
	library(join(folder, DRIVER), DRIVER, [driver, ...sources]);
	for (const soname of libraries) library(join(folder, soname), soname, ["/dev/null"]);
	return folder;
}

/** A source with the driver's functions that a library calls and the fake does not have; each refuses. */
export function otherFunctions(parent: string, library: string): string {
	const listed = execFileSync("nm", ["-D", "--undefined-only", library], { encoding: "utf8" });
	const wanted = [...listed.matchAll(/ U (cu[A-Z]\w*)/g)].map((match) => String(match[1]));
	if (!wanted.includes("cuInit")) throw new Error(`${library} does not call the driver`);
	const fake = readFileSync(join(root, "crates", "arl-cuda-libraries", "tests", "fake", "libcuda.c"), "utf8");
	const has = new Set([...fake.matchAll(/^int (cu\w+)\(/gm)].map((match) => match[1]));
	const file = join(parent, "other.c");
	const others = wanted.filter((name) => !has.has(name));
	writeFileSync(file, others.map((name) => `int ${name}(void) { return 999; }\n`).join(""));
	return file;
}

/** The libraries that a library asks for in addition to the system's own, and those that are opened before it. */
export function neededLibraries(library: string): { others: string[]; known: string[] } {
	const listed = execFileSync("readelf", ["-d", library], { encoding: "utf8" });
	const needed = [...listed.matchAll(/\(NEEDED\).*\[(.*)\]/g)].map((match) => String(match[1]));
	const system = /^(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux-x86-64)\.so\.\d+$/;
	return { others: needed.filter((name) => !system.test(name)), known: [DRIVER, ...LIBRARIES] };
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
