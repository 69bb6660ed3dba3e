// The CUDA toolkit: the one that is there, or NVIDIA's compiler wheels from the Python package index, laid out as one in the
// build cache. `npm run cuda:toolkit` runs it by itself. Knows pip and nvcc, and nothing of what is compiled.

import { spawnSync } from "node:child_process";
import {
	chmodSync,
	cpSync,
	existsSync,
	mkdirSync,
	mkdtempSync,
	readdirSync,
	readFileSync,
	renameSync,
	rmSync,
	symlinkSync,
	writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { cache, root } from "./setup.mjs";

/** The CUDA version whose PTX every driver from 580 on reads, and whose libraries the addon asks for. */
export const CUDA_VERSION = "13.0";

/** The wheels of a toolkit of that version: the compiler, and the libraries that the addon needs at run time. */
const WHEELS = [
	"nvidia-cuda-nvcc==13.0.88",
	"nvidia-cuda-crt==13.0.88",
	"nvidia-nvvm==13.0.88",
	"nvidia-cuda-cccl==13.0.85",
	"nvidia-cudnn-frontend==1.32.0",
	...readFileSync(join(root, "crates", "arl-cuda-libraries", "libraries.txt"), "utf8")
		.trim()
		.split("\n")
		.map((line) => line.split(" ")[0])
		// What several GPUs need at run time is not linked, and large.
		.filter((wheel) => !wheel.startsWith("nvidia-nccl")),
];

/** What a toolkit must hold to compile kernels, and what more to build the addon, below its folder. */
const FOR_KERNELS = ["bin/nvcc", "bin/ptxas", "include/cuda_runtime.h"];
const FOR_ADDON = [
	...["cudart", "cublas", "cublasLt", "curand", "nvrtc"].map((name) => `lib64/lib${name}.so`),
	...["cublasLt.h", "curand.h", "nvrtc.h", "cudnn.h", "cudnn_frontend.h"].map((name) => `include/${name}`),
];

const STAMP = "arl-toolkit.json";

/** The folder of the toolkit that this script supplies. */
export const suppliedToolkit = join(cache, "cuda", CUDA_VERSION);

function output(command, args, options = {}) {
	const { status, stdout, stderr, error } = spawnSync(command, args, { encoding: "utf8", ...options });
	if (error) return { ok: false, text: error.message };
	return { ok: status === 0, text: `${stdout}${stderr}`.trim() };
}

/** The release that a toolkit's compiler names, such as `13.0`; undefined where it does not run. */
function releaseOf(home) {
	const { ok, text } = output(join(home, "bin", "nvcc"), ["--version"]);
	return ok ? /release (\d+\.\d+)/.exec(text)?.[1] : undefined;
}

/** Why the toolkit at `home` cannot be used, or null. The addon asks for libraries of CUDA 13, so 12 serves kernels alone. */
function refusal(home, forAddon) {
	if (!existsSync(join(home, "bin", "nvcc"))) return "it has no bin/nvcc";
	const release = releaseOf(home);
	if (release === undefined) return "its nvcc does not run";
	const fits = release === CUDA_VERSION || (!forAddon && release.startsWith("12."));
	if (!fits) return `it is CUDA ${release}, and ${forAddon ? CUDA_VERSION : `${CUDA_VERSION} or 12`} is needed`;
	const missing = (forAddon ? [...FOR_KERNELS, ...FOR_ADDON] : FOR_KERNELS).filter(
		(path) => !existsSync(join(home, path)),
	);
	return missing.length > 0 ? `it lacks ${missing.join(", ")}` : null;
}

/** A toolkit that is there already: the one that the environment names, or the system's. */
function present(forAddon, say) {
	const { env } = process;
	const named = [
		["ARL_CUDA_HOME", env.ARL_CUDA_HOME],
		["CUDA_HOME", env.CUDA_HOME],
		["CUDA_PATH", env.CUDA_PATH],
		["the system", existsSync("/usr/local/cuda/bin/nvcc") ? "/usr/local/cuda" : undefined],
	];
	for (const [source, home] of named) {
		if (!home) continue;
		const why = refusal(home, forAddon);
		if (why === null) return { home, version: releaseOf(home), source };
		if (source === "ARL_CUDA_HOME")
			return { reason: `the CUDA toolkit at ${home} (ARL_CUDA_HOME) cannot be used: ${why}` };
		say(`arl: the CUDA toolkit at ${home} (${source}) is passed over: ${why}`);
	}
	return undefined;
}

/** pip, as a command and its first arguments, or the reason why there is none. */
function pip() {
	const python = process.env.ARL_PYTHON || "python3";
	const { ok, text } = output(python, ["-m", "pip", "--version"]);
	if (ok) return { command: [python, "-m", "pip"] };
	return { reason: `\`${python} -m pip\` does not run (${text.split("\n").at(-1)}), and it fetches NVIDIA's compiler` };
}

/** Puts the wheels into `folder`; null, or the reason why not. They are taken for one fixed Python, as none of it is run. */
function fetchWheels(folder) {
	const { command, reason } = pip();
	if (reason) return reason;
	const platforms = ["manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014"];
	const { ok, text } = output(
		command[0],
		[
			...command.slice(1),
			"install",
			...["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--no-cache-dir"],
			...["--only-binary=:all:", "--implementation=cp", "--python-version=3.11", "--abi=cp311", "--abi=none"],
			...platforms.map((name) => `--platform=${name}_x86_64`),
			"--platform=any",
			`--target=${folder}`,
			...WHEELS,
		],
		{ env: { ...process.env, PIP_USER: "0" } },
	);
	if (ok) return null;
	const error = text.split("\n").findLast((line) => line.startsWith("ERROR")) ?? text.split("\n").at(-1);
	return `pip could not install NVIDIA's wheels: ${error}`;
}

/** An empty driver library to link against; the real one comes with the driver. */
function linkStub(folder) {
	mkdirSync(folder, { recursive: true });
	const args = [
		"-shared",
		"-nostdlib",
		"-Wl,-soname,libcuda.so.1",
		"-x",
		"c",
		"/dev/null",
		"-o",
		join(folder, "libcuda.so"),
	];
	const { ok, text } = output(process.env.CC ?? "cc", args);
	return ok ? null : `a C compiler is needed (${text.split("\n")[0]})`;
}

/** Makes a toolkit's folder `home` of unpacked wheels. */
function layOut(wheels, home) {
	renameSync(join(wheels, "nvidia", "cu13"), home);
	for (const part of ["include", "lib"]) {
		cpSync(join(wheels, "nvidia", "cudnn", part), join(home, part), { recursive: true });
	}
	cpSync(join(wheels, "include"), join(home, "include"), { recursive: true });
	for (const name of readdirSync(join(home, "lib"))) {
		const link = /^(lib\w+\.so)\.[\d.]+$/.exec(name)?.[1];
		if (link) symlinkSync(name, join(home, "lib", link));
	}
	symlinkSync("lib", join(home, "lib64"));
	mkdirSync(join(home, "targets", "x86_64-linux"), { recursive: true });
	for (const part of ["include", "lib"])
		symlinkSync(join("..", "..", part), join(home, "targets", "x86_64-linux", part));
	for (const folder of ["bin", "nvvm/bin"]) {
		for (const entry of readdirSync(join(home, folder), { withFileTypes: true })) {
			if (entry.isFile()) chmodSync(join(home, folder, entry.name), 0o755);
		}
	}
}

/** Why the toolkit at `home` does not compile a kernel, or null. */
function trial(home) {
	const folder = mkdtempSync(join(tmpdir(), "arl-nvcc-"));
	try {
		writeFileSync(join(folder, "trial.cu"), "__global__ void trial(float *x) { x[threadIdx.x] *= 2.0f; }\n");
		const args = ["-fatbin", "-arch=sm_80", "trial.cu", "-o", "trial.fatbin"];
		const { ok, text } = output(join(home, "bin", "nvcc"), args, { cwd: folder });
		return ok ? null : `its nvcc compiles nothing: ${text.split("\n").slice(0, 3).join(" ")}`;
	} finally {
		rmSync(folder, { recursive: true, force: true });
	}
}

/** Puts a toolkit of the wheels into the build cache, whole or not at all; null, or the reason why not. */
function supply(say) {
	say(
		`arl: fetching NVIDIA's CUDA ${CUDA_VERSION} compiler and libraries with pip (1.2 GB, once; kept in ${suppliedToolkit})`,
	);
	mkdirSync(join(cache, "cuda"), { recursive: true });
	const work = mkdtempSync(join(cache, "cuda", "partial-"));
	try {
		const wheels = join(work, "wheels");
		const home = join(work, "home");
		const unfetched = fetchWheels(wheels);
		if (unfetched) return unfetched;
		layOut(wheels, home);
		const broken = linkStub(join(home, "lib", "stubs")) ?? refusal(home, true) ?? trial(home);
		if (broken) return `the CUDA toolkit made of NVIDIA's wheels cannot be used: ${broken}`;
		writeFileSync(join(home, STAMP), JSON.stringify(WHEELS));
		if (existsSync(suppliedToolkit)) renameSync(suppliedToolkit, join(work, "replaced"));
		renameSync(home, suppliedToolkit);
		return null;
	} catch (error) {
		return suppliedIsWhole() ? null : `the CUDA toolkit cannot be put into ${suppliedToolkit}: ${error.message}`;
	} finally {
		rmSync(work, { recursive: true, force: true });
	}
}

function suppliedIsWhole() {
	const stamp = join(suppliedToolkit, STAMP);
	return existsSync(stamp) && readFileSync(stamp, "utf8") === JSON.stringify(WHEELS);
}

/**
 * A CUDA toolkit: `{ home, version, source }`, or `{ reason }` in a sentence where none is there and none can be had.
 * `forAddon`: one that the addon can be linked with, not only kernels compiled; `fetch`: false only looks.
 */
export function cudaToolkit({ forAddon = false, fetch = true, say = console.error } = {}) {
	const found = present(forAddon, say);
	if (found) return found;
	if (process.platform !== "linux" || process.arch !== "x64") {
		return { reason: `CUDA is built on Linux x64 only; this is ${process.platform} ${process.arch}` };
	}
	if (!suppliedIsWhole()) {
		if (!fetch) return { reason: "there is no CUDA toolkit; `npm run cuda:toolkit` fetches one" };
		const reason = supply(say);
		if (reason) return { reason };
	}
	const release = releaseOf(suppliedToolkit);
	if (release !== CUDA_VERSION)
		return { reason: `the compiler in ${suppliedToolkit} does not run; delete that folder` };
	return { home: suppliedToolkit, version: release, source: "the build cache" };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	const { home, version, source, reason } = cudaToolkit({ forAddon: true });
	if (reason) {
		console.error(`arl: no CUDA toolkit: ${reason}`);
		process.exitCode = 1;
	} else {
		console.log(`CUDA ${version} at ${home} (${source})`);
	}
}
