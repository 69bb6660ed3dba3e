// `npm run cuda:kernels`: compiles every kernel for every GPU that is supported, as the CUDA addon's build does, and checks
// what the compiler says: no kernel spills registers, and the PTX is of a version that the oldest supported driver knows.

import { spawnSync } from "node:child_process";
import {
	copyFileSync,
	existsSync,
	mkdirSync,
	mkdtempSync,
	readdirSync,
	readFileSync,
	rmSync,
	statSync,
	writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { cudaToolkit } from "./cuda-toolkit.mjs";
import { cache, hashOf, root } from "./setup.mjs";

const SOURCES = ["crates/arl-kernels/cuda", "crates/arl-kernels/nvcc.flags"];

/** The PTX of CUDA 13.0: the latest that driver 580 knows. */
const MOST_PTX = [9, 0];

/** Bytes of registers that a kernel may spill, if not 0: attention's kernels, and a norm, need a few for compute capability 12.0. */
const MOST_SPILLED = { sm_120: 16 };

/** One kernel on one architecture, from what `ptxas -v` prints. */
function kernelsOf(text) {
	const entry =
		/Compiling entry function '(\w+)' for '(\w+)'[\s\S]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads[\s\S]*?Used (\d+) registers/g;
	return [...text.matchAll(entry)].map(([, kernel, architecture, stack, stores, loads, registers]) => ({
		kernel,
		architecture,
		stack: Number(stack),
		spilled: Number(stores) + Number(loads),
		registers: Number(registers),
	}));
}

function ptxVersions(folder) {
	const files = readdirSync(folder).filter((name) => name.endsWith(".ptx"));
	return files.map((name) =>
		/^\.version (\d+)\.(\d+)/m
			.exec(readFileSync(join(folder, name), "utf8"))
			.slice(1)
			.map(Number),
	);
}

/** The flags, without the GPUs that this compiler does not know: those of CUDA 12 lack the newest. */
function flagsFor(nvcc) {
	const { stdout } = spawnSync(nvcc, ["--list-gpu-code"], { encoding: "utf8" });
	const known = new Set(stdout?.split(/\s+/));
	const flags = readFileSync(join(root, "crates/arl-kernels/nvcc.flags"), "utf8").trim().split(/\s+/);
	return flags.filter((flag) => {
		// Of 9.0a the list has 9.0.
		const code = /code=(sm_\d+)/.exec(flag)?.[1];
		return code === undefined || known.has(code);
	});
}

/** Compiles, writes the kernels to `kept`, and gives what the compiler said; `error` where it refused. */
function compile(nvcc, compilerFlags, home, kept) {
	const folder = mkdtempSync(join(tmpdir(), "arl-kernels-"));
	try {
		const out = join(folder, "arl.fatbin");
		const watch = ["-Xptxas", "-v", "--keep", "--keep-dir", folder, "-fatbin", "-o", out];
		const args = [...compilerFlags, ...watch, "crates/arl-kernels/cuda/kernels.cu"];
		const options = { cwd: root, encoding: "utf8", maxBuffer: 1 << 28, env: { ...process.env, CUDA_HOME: home } };
		const { status, stdout, stderr, error } = spawnSync(nvcc, args, options);
		if (error || status !== 0) return { error: error?.message ?? `${stdout}${stderr}` };
		mkdirSync(dirname(kept), { recursive: true });
		copyFileSync(out, kept);
		return { kernels: kernelsOf(`${stdout}${stderr}`), ptx: ptxVersions(folder), bytes: statSync(out).size };
	} finally {
		rmSync(folder, { recursive: true, force: true });
	}
}

/** What is wrong with the kernels, as sentences. */
function faults({ kernels, ptx }) {
	const found = [];
	if (kernels.length === 0 || ptx.length === 0) found.push("the compiler reported no kernel");
	for (const { kernel, architecture, spilled } of kernels) {
		if (spilled > (MOST_SPILLED[architecture] ?? 0)) found.push(`${kernel} spills ${spilled} bytes on ${architecture}`);
	}
	for (const [major, minor] of ptx) {
		const newer = major > MOST_PTX[0] || (major === MOST_PTX[0] && minor > MOST_PTX[1]);
		if (newer) found.push(`the PTX is of version ${major}.${minor}; driver 580 knows ${MOST_PTX.join(".")}`);
	}
	return found;
}

/**
 * Checks the kernels: `{ reason }` where there is no toolkit, else `{ faults, summary, fatbin }`, of which the last is the file
 * of the kernels, for a build of the addon with the same toolkit. It and what the compiler said of the very same sources are
 * kept in the build cache.
 */
export function checkKernels() {
	const { home, version, reason } = cudaToolkit();
	if (reason) return { reason };
	const nvcc = join(home, "bin", "nvcc");
	const flags = flagsFor(nvcc);
	const kept = join(cache, "kernels", hashOf(SOURCES, [version, ...flags]));
	const [fatbin, report] = [`${kept}.fatbin`, `${kept}.json`];
	let said = existsSync(report) && existsSync(fatbin) ? JSON.parse(readFileSync(report, "utf8")) : undefined;
	if (said === undefined) {
		console.error(
			"arl: compiling the CUDA kernels for each GPU (a few minutes; they and what the compiler says are kept)",
		);
		said = compile(nvcc, flags, home, fatbin);
		if (said.error) return { faults: [said.error], summary: "" };
		writeFileSync(report, JSON.stringify(said));
	}
	const names = new Set(said.kernels.map(({ kernel }) => kernel));
	const architectures = [...new Set(said.kernels.map(({ architecture }) => architecture))].sort();
	const most = Math.max(...said.kernels.map(({ registers }) => registers));
	const summary = `${names.size} kernels for ${architectures.join(", ")} and PTX ${said.ptx[0]?.join(".")}: ${said.bytes} bytes, at most ${most} registers`;
	return { faults: faults(said), summary, fatbin };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	const { reason, faults: found = [], summary } = checkKernels();
	if (reason) console.error(`arl: the kernels cannot be compiled: ${reason}`);
	else console.log(found.length > 0 ? found.join("\n") : summary);
	process.exitCode = reason || found.length > 0 ? 1 : 0;
}
