/** The CUDA toolkit's script: which toolkit it takes, and what it says where none can be had. Nothing is fetched. */
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { describe, expect, it } from "vitest";
import { cudaSystem } from "./support/cuda.js";
import { temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();

/** A folder that looks like a toolkit of that release, with further files. */
function toolkit(release: string, files: string[] = []): string {
	const home = mkdtempSync(join(folder, "toolkit-"));
	for (const file of ["bin/ptxas", "include/cuda_runtime.h", ...files]) {
		mkdirSync(dirname(join(home, file)), { recursive: true });
		writeFileSync(join(home, file), "");
	}
	writeFileSync(
		join(home, "bin/nvcc"),
		`#!/bin/sh\necho "Cuda compilation tools, release ${release}, V${release}.1"\n`,
		{
			mode: 0o755,
		},
	);
	return home;
}

const FOR_ADDON = [
	...["cudart", "cublas", "cublasLt", "curand", "nvrtc"].map((name) => `lib64/lib${name}.so`),
	...["cublasLt.h", "curand.h", "nvrtc.h", "cudnn.h", "cudnn_frontend.h"].map((name) => `include/${name}`),
];

/** What the script finds with these variables, an empty build cache and a Python that is not there. */
function found(options: object, env: NodeJS.ProcessEnv) {
	const script = `
		import { cudaToolkit } from ${JSON.stringify(join(root, "scripts", "cuda-toolkit.mjs"))};
		console.log(JSON.stringify(cudaToolkit(${JSON.stringify(options)})));`;
	const { stdout, stderr } = spawnSync(process.execPath, ["--input-type=module", "-e", script], {
		encoding: "utf8",
		env: {
			PATH: process.env.PATH,
			ARL_CACHE: mkdtempSync(join(folder, "cache-")),
			ARL_PYTHON: "/none/python3",
			...env,
		},
	});
	return { ...(JSON.parse(stdout) as { home?: string; version?: string; source?: string; reason?: string }), stderr };
}

describe.runIf(cudaSystem)("a CUDA toolkit", () => {
	it("that is named is taken: 13.0 for the addon, 12 for kernels alone", () => {
		const whole = toolkit("13.0", FOR_ADDON);
		const taken = { home: whole, version: "13.0", source: "ARL_CUDA_HOME" };
		expect(found({ forAddon: true }, { ARL_CUDA_HOME: whole })).toMatchObject(taken);
		const older = toolkit("12.8");
		expect(found({}, { CUDA_HOME: older })).toMatchObject({ home: older, source: "CUDA_HOME" });
		expect(found({ forAddon: true }, { ARL_CUDA_HOME: older }).reason).toBe(
			`the CUDA toolkit at ${older} (ARL_CUDA_HOME) cannot be used: it is CUDA 12.8, and 13.0 is needed`,
		);
	});

	it("of another version, or that lacks a part, is passed over, and that is said", () => {
		const newer = toolkit("13.2", FOR_ADDON);
		const part = toolkit("13.0", FOR_ADDON.slice(1));
		const { stderr } = found({ forAddon: true }, { CUDA_HOME: newer, CUDA_PATH: part });
		expect(stderr).toContain(`at ${newer} (CUDA_HOME) is passed over: it is CUDA 13.2, and 13.0 is needed`);
		expect(stderr).toContain(`at ${part} (CUDA_PATH) is passed over: it lacks lib64/libcudart.so`);
	});

	it("that can be had from nowhere is reported with the reason", (context) => {
		if (existsSync("/usr/local/cuda/bin/nvcc")) {
			process.stderr.write("SKIPPED: a machine without a CUDA toolkit: this one has /usr/local/cuda\n");
			return context.skip();
		}
		expect(found({}, {}).reason).toContain("`/none/python3 -m pip` does not run (spawnSync /none/python3 ENOENT)");
		expect(found({ fetch: false }, {}).reason).toContain("`npm run cuda:toolkit` fetches one");
	});
});
