// `npm run build:bench`: everything that `bench/gpu` needs as one folder, `out/bench-gpu`, which can be carried to a machine
// with a GPU that has neither compiler nor Node. `npm run bench:gpu -- ARGUMENTS` builds it and runs it.

import { spawnSync } from "node:child_process";
import {
	chmodSync,
	copyFileSync,
	cpSync,
	existsSync,
	mkdirSync,
	readdirSync,
	rmSync,
	statSync,
	writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { cudaToolkit } from "./cuda-toolkit.mjs";
import { CUDA_TRIPLE, cargoEnv, cudaEnv, orExplain, root, run } from "./setup.mjs";

const folder = join(root, "out", "bench-gpu");
const shared = process.env.ARL_SHARED ?? join(root, "..", "shared");

/** What the machine with the GPU may be sent at most. */
const MOST_BYTES = 50 * 2 ** 20;

/** The files of a golden case. */
const GOLDEN = [
	"config.json",
	"curve.json",
	...["model", "batch", "forward", "grads", "trained"].map((name) => `${name}.safetensors`),
];

const README = `gpu checks arl's engine on an NVIDIA GPU against the CPU's, and then times it, one JSON line a case.

    ./gpu-first.sh found       the first command: what works, what is wrong, how fast it is, in eight minutes and one folder
    ./gpu                      all of it, within 570 seconds (--budget); stops at the first wrong number
    ./gpu --keep-going         names what is wrong and continues, each family of checks in a process of its own
    ./gpu --shapes 5 --only context       a shorter check, then one case; --list names them
    ./gpu --attention cudnn    with cuDNN's attention, checked first; auto: where it can be used
    ./gpu --profile            each leaf's share of a step instead of times
    ./gpu --device cpu --rehearse         all of it with tiny models, without a GPU

\`kernels\` has the kernels' sources. With nvcc they can be changed, compiled and tried there, without Rust:

    nvcc $(cat kernels/nvcc.flags) -fatbin kernels/cuda/kernels.cu -o k.fatbin && ARL_FATBIN=k.fatbin ./gpu --only leaves --shapes 5

\`-arch=sm_90a\` in place of the flags compiles for one GPU, in a minute. ARL_CUDA_SYNC=1 names the operation at which a GPU fails.

It needs the driver (580 or newer) and NVIDIA's CUDA 13 libraries, which it finds by itself in ldconfig, /usr/local/cuda, or the
Python of VIRTUAL_ENV or PATH; ARL_CUDA_LIBRARIES names folders. --python names one with torch and transformers for the peer.
`;

function copy(from, to) {
	mkdirSync(dirname(to), { recursive: true });
	copyFileSync(from, to);
	chmodSync(to, 0o644);
}

/** A program; without the names that only a debugger reads, unless it is a script. */
function install(from, to) {
	copy(from, to);
	if (!from.endsWith(".sh") && spawnSync("strip", ["--strip-unneeded", to]).status !== 0)
		console.error(`arl: ${to} keeps its symbols (no \`strip\`)`);
	chmodSync(to, 0o755);
}

function bytesOf(path) {
	if (!statSync(path).isDirectory()) return statSync(path).size;
	return readdirSync(path).reduce((sum, name) => sum + bytesOf(join(path, name)), 0);
}

/** Ends with a sentence. */
function stop(message) {
	console.error(`\narl: ${message}`);
	process.exit(1);
}

function build() {
	if (!existsSync(join(shared, "bench", "hf_sft.py"))) {
		stop(`${shared} has no bench folder with the models' configurations and the peer; ARL_SHARED names another place`);
	}
	const { home, reason } = cudaToolkit({ forAddon: true });
	if (reason) stop(`the library with CUDA cannot be built: ${reason}`);
	const release = ["build", "--release", "--locked", "--quiet", "-p", "arl-bench"];
	// Beside the addon: in one graph of crates candle's kernels, which take longest, are those of `npm run build:cuda`.
	const library = ["-p", "arl-node", "--lib", "--no-default-features", "--features", "arl-node/cuda,arl-bench/cuda"];
	console.error("arl: building the launcher and the library with CUDA (ten minutes on two cores the first time)");
	const target = orExplain(() => {
		run("cargo", [...release, "--bin", "gpu"], { env: cargoEnv() });
		const env = cudaEnv(home);
		run("cargo", [...release, ...library, "--target", CUDA_TRIPLE], { env });
		return env.CARGO_TARGET_DIR;
	});

	rmSync(folder, { recursive: true, force: true });
	install(join(target, "release", "gpu"), join(folder, "gpu"));
	install(join(target, CUDA_TRIPLE, "release", "libarl_bench.so"), join(folder, "libarl_bench.so"));
	copy(join(shared, "bench", "hf_sft.py"), join(folder, "hf_sft.py"));
	for (const configs of [join(shared, "bench", "configs"), join(root, "bench", "configs")]) {
		for (const name of readdirSync(configs)) {
			copy(join(configs, name, "config.json"), join(folder, "configs", name, "config.json"));
		}
	}
	install(join(root, "bench", "gpu-first.sh"), join(folder, "gpu-first.sh"));
	for (const part of ["cuda", "nvcc.flags"]) {
		cpSync(join(root, "crates", "arl-kernels", part), join(folder, "kernels", part), { recursive: true });
	}
	const golden = join(shared, "golden");
	for (const name of readdirSync(golden)) {
		if (!GOLDEN.every((file) => existsSync(join(golden, name, file)))) continue;
		for (const file of GOLDEN) copy(join(golden, name, file), join(folder, "golden", name, file));
	}
	writeFileSync(join(folder, "README"), README);
	const bytes = bytesOf(folder);
	console.error(`arl: ${folder}: ${(bytes / 2 ** 20).toFixed(1)} MiB`);
	if (bytes > MOST_BYTES) stop(`that is more than ${MOST_BYTES / 2 ** 20} MiB`);
}

build();
if (process.argv[2] === "run") {
	const { status, signal } = spawnSync(join(folder, "gpu"), process.argv.slice(3), { stdio: "inherit" });
	process.exitCode = status ?? (signal ? 1 : 0);
}
