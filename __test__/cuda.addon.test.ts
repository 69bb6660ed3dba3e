/**
 * The CUDA addon itself, with NVIDIA's real libraries, on any machine: a fake driver stands in for what only a GPU's has.
 * `npm run build:cuda` builds it; without it, or without the libraries, these tests are skipped.
 */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { cudaToolkit } from "../scripts/cuda-toolkit.mjs";
import { ADDON_LOADER } from "../src/native.js";
import { fakeCuda, H100, neededLibraries, onlyIn, otherFunctions } from "./support/cuda.js";
import { temporaryFolder } from "./support/folder.js";
import { arl, root } from "./support/real.js";

const addon = join(root, "arl.linux-x64-gnu-cuda.node");
const toolkit = cudaToolkit({ forAddon: true, fetch: false, say: () => {} });
const missing = !existsSync(addon) ? `${addon} is not built (npm run build:cuda)` : toolkit.reason;
if (missing !== undefined) process.stderr.write(`SKIPPED: the CUDA addon is loaded: ${missing}\n`);

const folder = temporaryFolder();

describe.runIf(missing === undefined)("the CUDA addon", () => {
	const environment = (more: NodeJS.ProcessEnv) => {
		const driver = fakeCuda(folder, [], [otherFunctions(folder, addon)]);
		return onlyIn(folder, [driver, join(String(toolkit.home), "lib")], more);
	};

	it("asks for no library that is not opened before it", () => {
		const { others, known } = neededLibraries(addon);
		expect(others).toContain("libcublas.so.13");
		expect(known).toEqual(expect.arrayContaining(others));
	});

	it("loads once NVIDIA's libraries are open, as far as `arl doctor` can tell", async () => {
		const { stdout } = await arl(["doctor", "--json"], undefined, undefined, environment({ FAKE_CUDA_GPUS: H100 }));
		const findings = JSON.parse(stdout) as { name: string; value: string; ok: boolean }[];
		const of = (name: string) => findings.find((finding) => finding.name === name);
		for (const name of ["cudart", "NVRTC", "cuRAND", "cuBLASLt", "cuBLAS", "cuDNN"]) {
			expect(of(name)?.value).toContain(join(String(toolkit.home), "lib"));
		}
		expect(of("cuda addon")).toMatchObject({ value: addon, ok: true });
		expect(of("device cuda:0")?.value).toContain("NVIDIA H100");
	});

	it("says cleanly what the driver refuses", () => {
		const script = `
			require(${JSON.stringify(ADDON_LOADER)}).cudaReport([]);
			const addon = require(${JSON.stringify(addon)});
			try { addon.cudaRuntime(0); } catch (error) { console.log(error.message); }`;
		const env = { ...process.env, ...environment({ FAKE_CUDA_INIT: "100" }) };
		const { status, signal, stdout, stderr } = spawnSync(process.execPath, ["-e", script], { encoding: "utf8", env });
		expect({ status, signal, stderr }).toEqual({ status: 0, signal: null, stderr: "" });
		const printed = JSON.parse(stdout) as { code: string; message: string };
		expect(printed.code).toBe("ARL_DEVICE");
		expect(printed.message).toMatch(/^cuda:0 cannot be opened: .*CUDA_ERROR_NO_DEVICE/);
	});
});
