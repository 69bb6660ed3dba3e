/**
 * The folder that is carried to a GPU, with NVIDIA's real libraries, on any machine: a fake driver stands in for what only a
 * GPU's has. `npm run build:bench` builds it; without it, or without the libraries, these tests are skipped.
 */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { cudaToolkit } from "../scripts/cuda-toolkit.mjs";
import { fakeCuda, H100, neededLibraries, onlyIn, otherFunctions } from "./support/cuda.js";
import { temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";

const bench = join(root, "out", "bench-gpu");
const library = join(bench, "libarl_bench.so");
const toolkit = cudaToolkit({ forAddon: true, fetch: false, say: () => {} });
const missing = !existsSync(library) ? `${bench} is not built (npm run build:bench)` : toolkit.reason;
if (missing !== undefined) process.stderr.write(`SKIPPED: the bench for GPUs is loaded: ${missing}\n`);

const folder = temporaryFolder();

describe.runIf(missing === undefined)("the bench for GPUs", () => {
	const gpu = (args: string[], env: NodeJS.ProcessEnv) =>
		spawnSync(join(bench, "gpu"), args, { encoding: "utf8", env: { ...process.env, ...env } });

	it("asks for no library that is not opened before it", () => {
		const { others, known } = neededLibraries(library);
		expect(others).toContain("libcublas.so.13");
		expect(known).toEqual(expect.arrayContaining(others));
	});

	it("finds NVIDIA's libraries, loads its own, and says cleanly what the driver refuses", () => {
		const driver = fakeCuda(folder, [], [otherFunctions(folder, library)]);
		const env = onlyIn(folder, [driver, join(String(toolkit.home), "lib")], { FAKE_CUDA_GPUS: H100 });
		const { status, signal, stdout, stderr } = gpu([], env);
		expect({ status, signal, stdout }).toEqual({ status: 1, signal: null, stdout: "" });
		expect(stderr).toMatch(/^gpu: ARL_DEVICE: cuda:0 cannot be opened: .*CUDA_ERROR_UNKNOWN/);
	});

	it("names the libraries that are missing", () => {
		const driver = fakeCuda(folder, []);
		const { status, stderr } = gpu([], onlyIn(folder, [driver], { FAKE_CUDA_GPUS: H100 }));
		expect(status).toBe(3);
		expect(stderr).toContain("gpu: CUDA cannot be used: CUDA libraries are missing: libcudart.so.13");
		expect(stderr).toContain("python3 -m pip install");
	});

	it("names a missing GPU", () => {
		const driver = fakeCuda(folder, []);
		const env = onlyIn(folder, [driver, join(String(toolkit.home), "lib")], { FAKE_CUDA_GPUS: H100 });
		const { status, stderr } = gpu(["--device", "cuda:3"], env);
		expect({ status, stderr }).toEqual({ status: 3, stderr: "gpu: CUDA cannot be used: there is no cuda:3\n" });
	});
});
