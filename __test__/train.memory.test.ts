/** The check of memory before a run, an engine out of memory, and what a device settles: nothing is left to guess. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { ArlError } from "../src/errors.js";
import type { DeviceInfo, EngineOptions, MemoryPlan } from "../src/native.js";
import { bf16Of } from "../src/run/checkpoint/state.js";
import { advise, checkMemory, withPlan } from "../src/run/setup/memory.js";
import { engineOptions, resolveArgs, resolveBf16, resolveForDevice } from "../src/run/setup/options.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { events, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const GIB = 2 ** 30;

const OPTIONS: EngineOptions = {
	modelDir: "m",
	device: "cuda:0",
	dtype: "bf16",
	recompute: "norms",
	maxTokens: 4096,
	maxSequences: 4,
	adamBeta1: 0.9,
	adamBeta2: 0.999,
	adamEpsilon: 1e-8,
	weightDecay: 0,
};

/** Weights of 10 GiB, moments of 40, activations of 4 for 1,024 tokens, half of it with block; in GiB, so that sums are seen. */
function plan(options: EngineOptions): MemoryPlan {
	const perToken = (options.recompute === "block" ? 2 : 4) / 1024;
	const activations = options.maxTokens * perToken * GIB;
	const moments = { name: "moments", bytes: 40 * GIB };
	const inHost = [
		...(options.optimizerOffload ? [moments] : []),
		...(options.activationOffloading ? [{ name: "activations", bytes: activations / 4 }] : []),
	];
	const onDevice = [
		{ name: "weights", bytes: 10 * GIB },
		...(options.optimizerOffload ? [] : [moments]),
		{ name: "activations", bytes: activations * (options.activationOffloading ? 0.75 : 1) },
	];
	const sum = (categories: MemoryPlan["categories"]) => categories.reduce((all, { bytes }) => all + bytes, 0);
	return {
		parameters: 1e9,
		trainedParameters: 1e9,
		flopsPerToken: 24,
		attentionFlops: 1,
		categories: onDevice,
		totalBytes: sum(onDevice),
		hostCategories: inHost,
		hostBytes: sum(inHost),
	};
}

const device = (name: string, memory: number, available: number): DeviceInfo => ({
	device: name,
	name: name === "cpu" ? "a processor" : "a GPU",
	threads: 1,
	features: [],
	memoryBytes: memory * GIB,
	availableBytes: available * GIB,
});
const host = device("cpu", 256, 200);
const free = { packed: false, resumed: false };
const check = (options: EngineOptions, gpu: DeviceInfo, machine = host) =>
	errorOf(() => checkMemory(plan(options), { device: gpu, host: machine }, () => advise(options, plan, free)));

describe("the check of memory", () => {
	it("shows the plan by category next to what is available, on the device and in host memory", () => {
		const gpu = device("cuda:0", 80, 79);
		const at = { device: gpu, host };
		const advice = () => advise(OPTIONS, plan, free);
		expect(checkMemory(plan(OPTIONS), at, advice)).toBe(
			"66.0 GiB planned, 79.0 GiB available on a GPU: weights 10.0 GiB, moments 40.0 GiB, activations 16.0 GiB",
		);
		expect(checkMemory(plan({ ...OPTIONS, optimizerOffload: true }), at, advice)).toBe(
			"26.0 GiB planned, 79.0 GiB available on a GPU: weights 10.0 GiB, activations 16.0 GiB; 40.0 GiB in host memory, 200.0 GiB available: moments 40.0 GiB",
		);
	});

	it("refuses what does not fit, and gives the bytes that each change saves, the largest first", async () => {
		const error = await check(OPTIONS, device("cuda:0", 24, 23));
		expect(error.code).toBe("ARL_OOM");
		expect(error.message).toBe(
			"the run needs 66.0 GiB of memory, and a GPU has 23.0 GiB available\nweights 10.0 GiB, moments 40.0 GiB, activations 16.0 GiB",
		);
		expect(error.hint.split("\n")).toEqual([
			"--optimizer_offload saves 40.0 GiB: it then needs 26.0 GiB, and 40.0 GiB in host memory.",
			"--gradient_checkpointing block saves 8.00 GiB: it then needs 58.0 GiB.",
			"--per_device_train_batch_size 2 saves 8.00 GiB: it then needs 58.0 GiB.",
			"--activation_offloading saves 4.00 GiB: it then needs 62.0 GiB, and 4.00 GiB in host memory.",
			"All of these together: 13.0 GiB, and 41.0 GiB in host memory, which fits.",
			"Raise gradient_accumulation_steps as per_device_train_batch_size falls, and each step is the same.",
		]);
	});

	it("says so where a change alone is enough, and where all together are not", async () => {
		expect((await check(OPTIONS, device("cuda:0", 40, 39))).hint).toContain(
			"it then needs 26.0 GiB, and 40.0 GiB in host memory, which fits.",
		);
		expect((await check(OPTIONS, device("cuda:0", 12, 11))).hint).toContain("which is still too much.");
	});

	it("says so where the memory is there but taken by another program, and not where it is too small anyway", async () => {
		const taken = await check(OPTIONS, device("cuda:0", 80, 30));
		expect(taken.message).toContain("its memory of 80.0 GiB would be enough, but 50.0 GiB are in use");
		expect(taken.hint).toContain("End the programs that use it (`nvidia-smi` shows them), or:");
		// What CUDA's own context takes is never free.
		const close = await check(OPTIONS, device("cuda:0", 66.5, 60));
		expect(close.message).not.toContain("would do");
		const small = await check(OPTIONS, device("cuda:0", 24, 10));
		expect(small.message).not.toContain("would do");
	});

	it("refuses offloading that the host's memory does not hold, by category and option", async () => {
		const options = { ...OPTIONS, optimizerOffload: true, activationOffloading: true };
		const error = await check(options, device("cuda:0", 80, 79), device("cpu", 32, 20));
		expect(error).toMatchObject({ code: "ARL_OOM" });
		expect(error.message).toBe(
			"the run keeps 44.0 GiB in host memory, and the machine has 32.0 GiB\nmoments 40.0 GiB, activations 4.00 GiB",
		);
		const onCpu = await check(options, device("cpu", 80, 79), device("cpu", 80, 20));
		expect(onCpu.message).toContain("the run keeps 44.0 GiB in host memory, and 20.0 GiB are available");
		expect(error.hint).toBe(
			"Without --optimizer_offload moments (40.0 GiB) stay on the GPU.\nWithout --activation_offloading activations (4.00 GiB) stay on the GPU.",
		);
	});

	it("leaves what a GPU offloads to the attempt where the host has the memory, however little of it is free", () => {
		const options = { ...OPTIONS, optimizerOffload: true };
		const at = { device: device("cuda:0", 80, 79), host: device("cpu", 64, 3) };
		expect(checkMemory(plan(options), at, () => advise(options, plan, free))).toContain(
			"40.0 GiB in host memory, 3.00 GiB available: moments 40.0 GiB",
		);
	});

	it("advises nothing that is on already, that saves nothing, or that a resumed run must not change", () => {
		const flags = (options: EngineOptions, freedom = free) =>
			advise(options, plan, freedom).changes.map(({ flags: words }) => words);
		expect(flags({ ...OPTIONS, recompute: "block", optimizerOffload: true, activationOffloading: true })).toEqual([
			"--per_device_train_batch_size 2",
		]);
		expect(flags({ ...OPTIONS, device: "cpu", dtype: "f32" })).toEqual([
			"--gradient_checkpointing block",
			"--per_device_train_batch_size 2",
		]);
		// Here masters are a category of their own.
		const withMasters = (options: EngineOptions) => {
			const { totalBytes, ...rest } = plan(options);
			const masters = options.dtype === "f16" ? 20 : options.dtype === "bf16" && !options.stochasticRounding ? 10 : 0;
			return { ...rest, totalBytes: totalBytes + masters * GIB };
		};
		const saving = (options: EngineOptions) =>
			advise(options, withMasters, free).changes.filter(({ flags: words }) => words.includes("16"));
		expect(saving(OPTIONS)).toMatchObject([{ flags: "--bf16_stochastic_round", savedBytes: 10 * GIB }]);
		expect(saving({ ...OPTIONS, stochasticRounding: true })).toEqual([]);
		expect(saving({ ...OPTIONS, dtype: "f16" })).toMatchObject([
			{ flags: "--fp16 false --bf16", savedBytes: 10 * GIB },
		]);
		expect(flags(OPTIONS, { packed: true, resumed: false })).toContain("--max_tokens_per_micro_batch 2048");
		expect(flags({ ...OPTIONS, maxSequences: 1 })).toContain("--max_length 2048");
		expect(flags(OPTIONS, { packed: false, resumed: true })).toEqual([
			"--optimizer_offload",
			"--gradient_checkpointing block",
			"--activation_offloading",
		]);
	});

	it("leaves errors of another kind as they are", () => {
		const error = new ArlError("ARL_WEIGHTS", "no tensor");
		expect(withPlan(error, plan(OPTIONS), () => advise(OPTIONS, plan, free))).toBe(error);
	});
});

describe("an engine out of memory", () => {
	it("in a step: the plan for its micro-batches, what to change, and the last checkpoint", async () => {
		const place = workspace(folder);
		const native = fakeNative({
			planMemory: plan,
			onStep: (step) => {
				if (step === 5) throw new ArlError("ARL_OOM", "the device gave no memory", "The device's own hint.");
				return undefined;
			},
		});
		const run = trainer(place, { save_strategy: "steps", save_steps: 2 }, native);
		const error = await errorOf(run.train());
		expect(error).toMatchObject({ code: "ARL_OOM", exitCode: 4 });
		expect(error.message).toMatch(
			/^step 5: the device gave no memory\nplanned were .*: weights 10\.0 GiB, moments 40\.0 GiB, activations /,
		);
		const checkpoint = join(place.out, "checkpoint-4");
		expect(error.hint).toMatch(/^The last checkpoint is whole: resume from it with --resume_from_checkpoint /);
		expect(error.hint).toContain(checkpoint);
		expect(error.hint).toContain("The device's own hint.");
		expect(error.hint).toContain("--gradient_checkpointing block saves");
		const result = await trainer(place, {
			save_strategy: "steps",
			save_steps: 2,
			resume_from_checkpoint: checkpoint,
		}).train();
		expect(result).toMatchObject({ outcome: "completed" });
	});

	it("while it is opened: the same, and nothing is left of the run", async () => {
		const place = workspace(folder);
		const native = fakeNative();
		native.Engine.open = () => Promise.reject(new ArlError("ARL_OOM", "the device gave no memory"));
		const error = await errorOf(trainer(place, {}, native).train());
		expect(error.message).toMatch(/^the device gave no memory\nplanned were .*: weights /);
		expect(existsSync(place.out)).toBe(false);
	});
});

describe("what the device settles", () => {
	const args = (more = {}) => resolveArgs({ model_name_or_path: "m", output_dir: "o", ...more }).args;
	const size = { maxTokens: 1, maxSequences: 1 };

	it("is bf16 on a GPU and f32 on the CPU, unless it is set", () => {
		for (const [bf16, name, dtype] of [
			["auto", "cuda:0", "bf16"],
			["auto", "cpu", "f32"],
			[false, "cuda:0", "f32"],
			[true, "cpu", "bf16"],
		] as const) {
			const settled = resolveForDevice(args({ bf16 }), name).args;
			expect(engineOptions(settled, name, size).dtype, `${bf16} on ${name}`).toBe(dtype);
		}
	});

	it("stays as it was in a resumed run, on whatever device, unless it is set", () => {
		const fp16 = resolveForDevice(args({ fp16: true }), "cuda:0").args;
		expect([fp16.bf16, engineOptions(fp16, "cuda:0", size).dtype]).toEqual([false, "f16"]);
		expect(resolveBf16("auto", "cuda:0", false)).toBe(false);
		expect(resolveBf16("auto", "cpu", true)).toBe(true);
		expect(resolveBf16(true, "cpu", false)).toBe(true);
		expect([bf16Of({ bf16: "true" }), bf16Of({ bf16: "false" }), bf16Of({})]).toEqual([true, false, null]);
	});

	it("keeps the bf16 of a resumed run where it is not set, and refuses another", async () => {
		const place = workspace(folder);
		const opened: EngineOptions[] = [];
		const watched = () => {
			const native = fakeNative();
			const { open } = native.Engine;
			native.Engine.open = (options) => {
				opened.push(options);
				return open(options);
			};
			return native;
		};
		await trainer(
			place,
			{ bf16: true, max_steps: 2, lr_scheduler_type: "constant", save_strategy: "steps" },
			watched(),
		).train();
		const on = { max_steps: 4, lr_scheduler_type: "constant", resume_from_checkpoint: "latest" } as const;
		await trainer(place, on, watched()).train();
		expect(opened.map(({ dtype }) => dtype)).toEqual(["bf16", "bf16"]);
		const refused = await errorOf(trainer(place, { ...on, max_steps: 6, bf16: false }, watched()).train());
		expect(refused.message).toContain("bf16: true -> false");
	});

	it("is reported where the engine has a notice about how the model runs there", async () => {
		const notice = "attention runs without tensor cores";
		const all = await events(trainer(workspace(folder), {}, fakeNative({ notice })));
		expect(ofType(all, "notice")).toContainEqual({ type: "notice", level: "warning", message: notice });
	});

	it("is offloading on a GPU alone: on the CPU a notice says that it has no effect, and it is not passed on", async () => {
		const both = { activation_offloading: true, optimizer_offload: true };
		const onGpu = resolveForDevice(args(both), "cuda:0");
		expect(onGpu.notices).toEqual([]);
		expect(engineOptions(onGpu.args, "cuda:0", size)).toMatchObject({
			activationOffloading: true,
			optimizerOffload: true,
		});
		const place = workspace(folder);
		const opened: EngineOptions[] = [];
		const native = fakeNative();
		const { open } = native.Engine;
		native.Engine.open = (options) => {
			opened.push(options);
			return open(options);
		};
		const all = await events(trainer(place, { ...both, device: "cpu" }, native));
		const notices = ofType(all, "notice").map(({ message }) => message);
		expect(notices).toContain(
			"activation_offloading has no effect on the CPU: everything is in the host's memory already",
		);
		expect(notices).toContain("optimizer_offload has no effect on the CPU: everything is in the host's memory already");
		expect(opened).toMatchObject([{ activationOffloading: false, optimizerOffload: false }]);
	});
});
