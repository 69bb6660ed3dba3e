/** The loader and `arl doctor` on machines with a GPU that are made up: nothing crashes, and nothing is kept back. */
import { copyFileSync, mkdtempSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it, type TestContext } from "vitest";
import type { CudaFinding } from "../src/device/cuda.js";
import { chooseDevice } from "../src/device/index.js";
import { loadNative } from "../src/native.js";
import { cudaSystem, DRIVER, fakeCuda, H100, LIBRARIES, library, onlyIn, TURING } from "./support/cuda.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, flags, root, tinyPlace } from "./support/real.js";

interface Finding {
	name: string;
	value: string;
	ok: boolean;
	hint?: string;
}

const folder = temporaryFolder();
const whole = cudaSystem ? fakeCuda(folder) : "";

/** What `arl doctor` finds, by name, and its exit code. */
async function doctor(folders: string[], more: NodeJS.ProcessEnv = {}) {
	const { code, stdout, stderr } = await arl(["doctor", "--json"], undefined, undefined, onlyIn(folder, folders, more));
	expect(stderr).toBe("");
	const findings = JSON.parse(stdout) as Finding[];
	return { code, found: (name: string) => findings.find((finding) => finding.name === name) };
}

function skip(context: TestContext, why: string): void {
	process.stderr.write(`SKIPPED: ${why}\n`);
	context.skip();
}

/** A CUDA addon that loads nowhere, or ends what loads it. */
function badAddon(source: string): string {
	const file = join(folder, `bad-${readdirSync(folder).length}.node`);
	if (source === "") writeFileSync(file, "not a library");
	else {
		writeFileSync(`${file}.c`, source);
		library(file, "bad.node", [`${file}.c`]);
	}
	return file;
}

const CRASHES = "#include <stdlib.h>\n__attribute__((constructor)) static void crash(void) { abort(); }\n";

describe.runIf(cudaSystem)("arl doctor", () => {
	it("says that a machine without a driver runs on the CPU, and that this is no failure", async (context) => {
		const { code, found } = await doctor([], { ARL_CUDA_ADDON: "/packages/cuda.node" });
		if (found("cuda driver")) return skip(context, "a machine without a driver: this one has one");
		expect(found("cuda")).toEqual({
			name: "cuda",
			value: "no NVIDIA driver (libcuda.so.1): runs on the CPU",
			ok: true,
		});
		// Who has installed it sees that it is found.
		expect(found("cuda addon")?.value).toBe("/packages/cuda.node");
		expect(code).toBe(0);
	});

	it("lists the driver, the GPUs and each library with its file", async () => {
		const { found } = await doctor([whole], { FAKE_CUDA_GPUS: `${H100};${TURING}` });
		expect(found("cuda driver")).toEqual({
			name: "cuda driver",
			value: `CUDA up to 13.0, ${join(whole, DRIVER)}`,
			ok: true,
		});
		expect(found("device cuda:0")?.value).toBe("NVIDIA H100, compute capability 9.0, 79.0 GiB of 80.0 GiB available");
		expect(found("device cuda:1")?.value).toBe(
			"NVIDIA T4, compute capability 7.5, 16.0 GiB; cannot be used: compute capability 7.5, and 8.0 (Ampere) or newer is needed",
		);
		for (const [name, soname] of [
			["cudart", LIBRARIES[0]],
			["NVRTC", LIBRARIES[1]],
			["cuRAND", LIBRARIES[2]],
			["cuBLASLt", LIBRARIES[3]],
			["cuBLAS", LIBRARIES[4]],
		] as const) {
			expect(found(name)).toEqual({ name, value: join(whole, soname), ok: true });
		}
	});

	it("names the release that an old driver must be", async () => {
		const { code, found } = await doctor([whole], { FAKE_CUDA_GPUS: H100, FAKE_CUDA_VERSION: "12080" });
		expect(found("cuda driver")?.ok).toBe(false);
		expect(found("cuda")).toMatchObject({
			value: "not used: the NVIDIA driver is too old: it serves CUDA up to 12.8, and 13.0 is needed",
			hint: "Install NVIDIA's driver 580 or newer.",
			ok: false,
		});
		expect(code).toBe(1);
	});

	it("names a missing library, where it was looked for, and the one command that supplies it", async (context) => {
		const part = fakeCuda(
			folder,
			LIBRARIES.filter((soname) => soname !== "libcurand.so.10"),
		);
		const { code, found } = await doctor([part], { FAKE_CUDA_GPUS: H100 });
		if (found("cuRAND")?.ok) return skip(context, "a machine that lacks a library: this one has cuRAND");
		expect(found("cuRAND")?.value).toBe("libcurand.so.10 was not found");
		const places = found("looked in")?.hint?.split("\n");
		expect(places?.slice(0, 2)).toEqual([part, "the system's folders"]);
		expect(places).toContain(`${folder}/home/cache/cuda/13.0/lib`);
		expect(found("cuda")?.hint).toMatch(
			/^Run `npx arl cuda install`, or with Python `python3 -m pip install .*--target \S+\/home\/cache\/cuda\/libraries nvidia-.*nvidia-curand==[\d.]+ /,
		);
		expect(code).toBe(1);
	});

	it("tells of a library that does not open, and of the one that is taken in its place", async () => {
		const broken = mkdtempSync(join(folder, "broken-"));
		writeFileSync(join(broken, "libcublas.so.13"), "not a library");
		const { found } = await doctor([broken, whole], { FAKE_CUDA_GPUS: H100 });
		expect(found("cuBLAS")?.value).toBe(join(whole, "libcublas.so.13"));
		expect(found("cuBLAS")?.hint).toMatch(/^\S+broken-\w+\/libcublas\.so\.13: (file too short|invalid ELF header)$/);
	});

	it("refuses a GPU that is too small by its name, and calls that no failure", async () => {
		const { code, found } = await doctor([whole], { FAKE_CUDA_GPUS: TURING });
		expect(found("cuda")?.value).toContain("no GPU that can be used: cuda:0 (NVIDIA T4): compute capability 7.5");
		expect(found("cuda")?.ok).toBe(true);
		expect(code).toBe(0);
	});

	it("outlives a driver that ends the process", async () => {
		const { code, found } = await doctor([whole], { FAKE_CUDA_INIT: "-1" });
		expect(found("cuda")?.value).toContain(
			"the NVIDIA driver or a CUDA library ends the process that opens it (SIGABRT)",
		);
		expect(found("cuda")?.ok).toBe(false);
		expect(code).toBe(1);
	});

	it("says that a CUDA addon does not load, and why; the process goes on", async () => {
		const damaged = badAddon("");
		const one = await doctor([whole], { FAKE_CUDA_GPUS: H100, ARL_CUDA_ADDON: damaged });
		expect(one.found("cuda addon")).toMatchObject({ value: damaged, ok: false });
		expect(one.found("cuda")?.value).toMatch(
			/^not used: the CUDA addon cannot be loaded: .*(file too short|invalid ELF header)/,
		);
		const crashing = badAddon(CRASHES);
		const two = await doctor([whole], { FAKE_CUDA_GPUS: H100, ARL_CUDA_ADDON: crashing });
		expect(two.found("cuda")?.value).toContain(`ends the process that loads it (SIGABRT): ${crashing}`);
		expect(two.found("cuda")?.hint).toBe("Run `npm run build:cuda`.");
		expect(two.code).toBe(1);
	});
});

describe.runIf(cudaSystem)("the option device", () => {
	const place = tinyPlace(folder);
	const train = (device: string, more: NodeJS.ProcessEnv) => {
		const options = { model_name_or_path: place.model, init_from_config: true, train_file: place.file, device };
		const run = {
			output_dir: `${place.out}-${device}`,
			max_steps: 1,
			save_strategy: "no",
			per_device_train_batch_size: 2,
		};
		return arl(["train", ...flags({ ...options, ...run })], undefined, undefined, onlyIn(folder, [whole], more));
	};

	it("cuda: a machine that cannot use it gets an error with what is missing and what to do", async () => {
		const { code, stderr } = await train("cuda", { FAKE_CUDA_GPUS: H100, FAKE_CUDA_VERSION: "12040" });
		expect(stderr).toContain("ARL_DEVICE device cuda: the NVIDIA driver is too old: it serves CUDA up to 12.4");
		expect(stderr).toContain("what to do: Install NVIDIA's driver 580 or newer.");
		expect(code).toBe(1);
	});

	it("auto: goes on with the CPU where the CUDA addon ends its process, and says so", async () => {
		const { code, stderr, stdout } = await train("auto", { FAKE_CUDA_GPUS: H100, ARL_CUDA_ADDON: badAddon(CRASHES) });
		expect(`${stdout}${stderr}`).toContain(
			"the GPU is not used: the CUDA addon ends the process that loads it (SIGABRT)",
		);
		expect(code).toBe(0);
	});
});

describe("choosing a device", () => {
	const device = (ordinal: number, problem?: string) => ({
		device: `cuda:${ordinal}`,
		name: `GPU ${ordinal}`,
		uuid: `${ordinal}`,
		capability: "9.0",
		memoryBytes: 80e9,
		availableBytes: 79e9,
		...(problem !== undefined && { problem }),
	});
	const finding = (addon: string | null = null): CudaFinding => ({
		report: { devices: [device(0, "it is too small"), device(1)], libraries: [] },
		addon,
		problem: null,
	});

	it("refuses a GPU that is not there or cannot be used, and names those that can", async () => {
		const none = await errorOf(() => chooseDevice("cuda:7", fakeNative(), () => finding()));
		expect(none).toMatchObject({ code: "ARL_DEVICE", message: "device cuda:7: there is no such GPU" });
		expect(none.hint).toBe("Usable devices: cuda:1, cpu.");
		const small = await errorOf(() => chooseDevice("cuda:0", fakeNative(), () => finding()));
		expect(small.message).toBe("device cuda:0 (GPU 0): it is too small");
	});

	it("does not look for CUDA where the CPU is asked for, and says nothing where there is no driver", () => {
		const find = () => {
			throw new Error("nobody asked");
		};
		expect(chooseDevice("cpu", fakeNative(), find)).toMatchObject({ device: "cpu", notice: null });
		expect(chooseDevice("auto", fakeNative())).toMatchObject({ device: "cpu", notice: null });
	});

	it("takes the first GPU that can be used, and the engine of the other addon", () => {
		const name = readdirSync(root).find((file) => /^arl\..*\.node$/.test(file) && !file.endsWith("-cuda.node"));
		const second = join(folder, "second.node");
		copyFileSync(join(root, String(name)), second);
		const native = loadNative();
		const chosen = chooseDevice("auto", native, () => finding(second));
		expect(chosen).toMatchObject({ device: "cuda:1", info: { name: "GPU 1", availableBytes: 79e9 } });
		expect(chosen.native).not.toBe(native);
		expect(chosen.native.version()).toBe(native.version());
	});
});
