/** `arl plan`: its numbers are the core's, every model that is measured works, and what it advises is true. */
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { deviceToPlan } from "../src/device/index.js";
import { type EngineOptions, loadNative, type MemoryPlan } from "../src/native.js";
import { cudaSystem, fakeCuda, H100, onlyIn } from "./support/cuda.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, root, sharedPath } from "./support/real.js";

const folder = temporaryFolder();
/** No GPU, whatever the machine has. */
const noGpu = onlyIn(folder, []);
const model = join(root, "assets", "model");
const GB = 1e9;

interface Change {
	flags: string;
	savedBytes: number;
	totalBytes: number;
	hostBytes: number;
}

type PlanJson = MemoryPlan & {
	device: string;
	dtype: string;
	world: number;
	zero: number;
	sent: { gradients: number; sums: number; weights: number; tokens: number; total: number } | null;
	tokens: number;
	sequences: number;
	evalTokens: number | null;
	evalSequences: number | null;
	deviceMemory: { name: string; fits: boolean } | null;
	contextBytes: number;
	gpus: { gigabytes: number; fits: boolean }[];
	changes: Change[];
	together: { totalBytes: number; hostBytes: number } | null;
};

const plan = (words: string[], env: NodeJS.ProcessEnv = noGpu) => arl(["plan", ...words], undefined, undefined, env);

async function planOf(words: string[], env: NodeJS.ProcessEnv = noGpu): Promise<PlanJson> {
	const { stdout, stderr, code } = await plan([...words, "--json"], env);
	expect(code, stderr).toBe(0);
	return JSON.parse(stdout) as PlanJson;
}

/** What the core says of a run with the default options. */
function core(modelDir: string, options: Partial<EngineOptions>): MemoryPlan {
	return loadNative().planMemory(coreOptions(modelDir, options));
}

function coreOptions(modelDir: string, options: Partial<EngineOptions>): EngineOptions {
	return {
		modelDir,
		device: "cuda",
		dtype: "bf16",
		recompute: "norms",
		attention: "own",
		maxTokens: 4096,
		maxSequences: 4,
		adamBeta1: 0.9,
		adamBeta2: 0.999,
		adamEpsilon: 1e-8,
		weightDecay: 0,
		...options,
	};
}

/** A model as large as wanted, of which there is the config alone. */
function wide(layers: number): string {
	const path = mkdtempSync(join(folder, "wide-"));
	const sizes = { hidden_size: 4096, intermediate_size: 12288, num_hidden_layers: layers, vocab_size: 151936 };
	const heads = { num_attention_heads: 32, num_key_value_heads: 8, head_dim: 128, max_position_embeddings: 4096 };
	const rest = { model_type: "qwen3", rms_norm_eps: 1e-6, rope_theta: 1e6, tie_word_embeddings: false };
	const config = { architectures: ["Qwen3ForCausalLM"], hidden_act: "silu", ...sizes, ...heads, ...rest };
	writeFileSync(join(path, "config.json"), JSON.stringify(config));
	return path;
}

describe("arl plan", () => {
	it("gives the core's numbers, by category and in all, with the options of a run", async () => {
		const words = ["--model_name_or_path", model, "--device", "cuda", "--tokens", "4096", "--sequences", "4"];
		const usual = await planOf(words);
		expect(usual).toMatchObject({ device: "cuda", dtype: "bf16", tokens: 4096, sequences: 4, ...core(model, {}) });
		const parts = usual.categories.reduce((sum, { bytes }) => sum + bytes, 0);
		expect(parts).toBe(usual.totalBytes);
		const other = ["--bf16", "false", "--gradient_checkpointing", "block", "--loss_seq_chunk_size", "64"];
		const offloads = { activationOffloading: true, optimizerOffload: true };
		expect(await planOf([...words, ...other, "--activation_offloading", "--optimizer_offload"])).toMatchObject(
			core(model, { dtype: "f32", recompute: "block", lossSeqChunkSize: 64, ...offloads }),
		);
		const onCpu = ["--model_name_or_path", model, "--device", "cpu", "--tokens", "4096", "--sequences", "4"];
		expect(await planOf(onCpu)).toMatchObject({ dtype: "f32", ...core(model, { device: "cpu", dtype: "f32" }) });
	});

	it("plans for each of several ranks, and what one sends in a step", async () => {
		const words = ["--model_name_or_path", model, "--device", "cpu", "--tokens", "4096", "--sequences", "4", "--bf16"];
		const onCpu = { device: "cpu" };
		const bytes = ({ categories }: PlanJson, name: string) => categories.find((one) => one.name === name)?.bytes ?? 0;
		for (const [zero, divided] of [
			["0", {}],
			["1", { zero: 1 }],
			["2", { zero: 2 }],
			["3", { zero: 3 }],
			["auto", { zero: 2 }],
		] as const) {
			const planned = await planOf([...words, "--world", "4", "--zero", zero, "--gradient_accumulation_steps", "3"]);
			const options = { ...onCpu, dataParallel: 4, ...divided };
			expect(planned).toMatchObject({ world: 4, zero: Number(planned.zero), ...core(model, options) });
			const sent = loadNative().planTraffic(coreOptions(model, options), 3);
			expect(planned.sent).toEqual({ ...sent, total: sent.gradients + sent.sums + sent.weights });
			expect(sent.tokens).toBe(0);
			// A rank sends all gradients but its own part, which is a quarter.
			const all = 12 * planned.parameters;
			expect(sent.gradients / all).toBeGreaterThan(0.74);
			expect(sent.gradients / all).toBeLessThan(0.76);
			expect([sent.sums > 0, sent.weights > 0]).toEqual([planned.zero < 2, planned.zero > 0]);
			expect(bytes(planned, "moments") / (8 * planned.parameters)).toBeCloseTo(planned.zero === 0 ? 1 : 0.25, 2);
			if (zero === "1" || zero === "2") continue;
			const { stdout } = await plan([...words, "--world", "4", "--zero", zero]);
			expect(stdout).toMatch(/^memory of each rank +GiB/m);
			expect(stdout).toMatch(/^sent by a rank in a step +MiB/m);
			expect(stdout).toContain(`zero ${planned.zero}${zero === "auto" ? " (auto)" : ""}: 4 ranks divide `);
		}
		expect(await planOf(words)).toMatchObject({ world: 1, zero: 0, sent: null });
		// A model whose weights alone are more than any machine of ours has.
		const large = ["--model_name_or_path", wide(1000), "--device", "cpu", "--tokens", "1024", "--bf16"];
		expect(await planOf([...large, "--world", "64"])).toMatchObject({ zero: 3 });
		const gpus = await planOf(["--model_name_or_path", model, "--device", "cuda", "--world", "2"]);
		expect(gpus).toMatchObject({ world: 2, zero: 2 });
	});

	it("plans for the ranks of a mesh, and what they send of activations", async () => {
		const words = [
			"--model_name_or_path",
			model,
			"--device",
			"cpu",
			"--tokens",
			"4096",
			"--sequences",
			"4",
			"--world",
			"4",
		];
		const heads = await planOf([...words, "--tp_size", "2"]);
		expect(heads).toMatchObject({ world: 4, dp_size: 2, tp_size: 2, zero: 2 });
		expect(heads).toMatchObject(core(model, { device: "cpu", dtype: "f32", dataParallel: 2, tpSize: 2, zero: 2 }));
		const alone = await planOf(words);
		expect(heads.totalBytes).toBeLessThan(0.8 * alone.totalBytes);
		expect([alone.sent?.tokens, (heads.sent?.tokens ?? 0) > 0]).toEqual([0, true]);
		const { stdout } = await plan([...words, "--tp_size", "2"]);
		expect(stdout).toContain("a mesh of 4 ranks: dp_size 2 x tp_size 2\n");
		expect(stdout).toMatch(/^ +activations +\d/m);
	});

	it("plans for the largest micro-batch that the options allow", async () => {
		const words = ["--model_name_or_path", model, "--device", "cuda"];
		const samples = [...words, "--per_device_train_batch_size", "3", "--max_length", "500"];
		expect(await planOf(samples)).toMatchObject({ tokens: 1500, sequences: 3 });
		expect(await planOf([...words, "--max_tokens_per_micro_batch", "6400"])).toMatchObject({
			tokens: 6400,
			sequences: 100,
		});
		const unbounded = await planOf([...words, "--per_device_train_batch_size", "2"]);
		const config = JSON.parse(readFileSync(join(model, "config.json"), "utf8"));
		expect(unbounded.tokens).toBe(2 * config.max_position_embeddings);
	});

	it("counts the largest micro-batch of held-out rows, where the options name some", async () => {
		const words = ["--model_name_or_path", model, "--device", "cuda", "--max_length", "512"];
		const trained = [...words, "--per_device_train_batch_size", "1"];
		expect(await planOf(trained)).toMatchObject({ evalTokens: null, evalSequences: null });
		const evaluated = [...trained, "--eval_file", "rows-that-nobody-reads.jsonl", "--per_device_eval_batch_size"];
		const sizes = { maxTokens: 512, maxSequences: 1, evalMaxTokens: 32_768, evalMaxSequences: 64 };
		const many = await planOf([...evaluated, "64"]);
		expect(many).toMatchObject({ tokens: 512, evalTokens: 32_768, evalSequences: 64, ...core(model, sizes) });
		expect(many.totalBytes).toBeGreaterThan((await planOf(trained)).totalBytes);
		const bounded = [...evaluated, "6", "--tokens", "200", "--sequences", "4"];
		expect(await planOf(bounded)).toMatchObject({ tokens: 200, sequences: 4, evalTokens: 300, evalSequences: 6 });
		const packed = [...words, "--max_tokens_per_micro_batch", "6400", "--eval_split", "0.02"];
		expect(await planOf(packed)).toMatchObject({ evalTokens: 6400, evalSequences: 100 });
		const { stdout } = await plan([...evaluated, "64"]);
		expect(stdout).toContain("\nevaluation of up to 32,768 tokens in 64 sequences at a time\n");
		const long = ["--model_name_or_path", model, "--max_length", "40000", "--per_device_train_batch_size", "1"];
		const huge = await plan([...long, "--eval_file", "e.jsonl", "--per_device_eval_batch_size", "65536"]);
		expect(huge.code).toBe(2);
		expect(huge.stderr).toContain("a micro-batch of 2621440000 tokens is too large");
	});

	it("counts the replies that an evaluation generates, for as many rows of max_length tokens as are generated at a time", async () => {
		const large = wide(36);
		const words = ["--model_name_or_path", large, "--device", "cuda", "--max_length", "512"];
		const evaluated = [...words, "--per_device_train_batch_size", "1", "--eval_file", "e.jsonl"];
		const none = await planOf(evaluated);
		expect(none).toMatchObject({ evalReplies: null, evalPromptTokens: null });
		const sizes = { maxTokens: 512, maxSequences: 1, evalMaxTokens: 8 * 512, evalMaxSequences: 8 };
		const prompts = (many: number, tokens: number) => [new Array<number>(many).fill(tokens)];
		const some = [...evaluated, "--eval_generate", "4"];
		const planned = await planOf(some);
		const generated = { evalPrompts: prompts(8, 512), evalMaxNewTokens: 8 };
		expect(planned).toMatchObject({
			evalReplies: 8,
			evalPromptTokens: 512,
			...core(large, { ...sizes, ...generated }),
		});
		const { stdout } = await plan(some);
		expect(stdout).toContain("\ngenerated replies to up to 8 rows of 512 tokens at a time\n");
		// Rows have no more tokens than a micro-batch. The keys and values of many are more than what its step takes.
		const held = ["--eval_file", "e.jsonl", "--eval_generate", "4", "--per_device_eval_batch_size", "1000"];
		const packed = ["--device", "cuda", "--max_tokens_per_micro_batch", "64", ...held];
		const many = await planOf(["--model_name_or_path", large, ...packed]);
		expect(many).toMatchObject({ evalReplies: 256, evalPromptTokens: 64 });
		expect(many.categories.map(({ name }) => name)).toContain("key-value cache");
	});

	it("advises fewer held-out rows at a time and shorter ones with what they save", async () => {
		const large = wide(36);
		const sizes = { maxTokens: 4096, maxSequences: 1, evalMaxTokens: 32 * 4096, evalMaxSequences: 32 };
		const words = ["--model_name_or_path", large, "--device", "cuda", "--per_device_train_batch_size", "1"];
		const planned = await planOf([...words, "--eval_file", "e.jsonl", "--per_device_eval_batch_size", "32"]);
		expect(planned.totalBytes).toBe(core(large, sizes).totalBytes);
		const half = { evalMaxTokens: 16 * 4096 };
		for (const [flags, other] of [
			["--per_device_eval_batch_size 16", { ...half, evalMaxSequences: 16 }],
			["--max_length 2048", { ...half, maxTokens: 2048 }],
		] as const) {
			const { totalBytes } = core(large, { ...sizes, ...other });
			const savedBytes = planned.totalBytes - totalBytes;
			expect(savedBytes).toBeGreaterThan(0);
			expect(planned.changes.find((change) => change.flags === flags)).toMatchObject({ totalBytes, savedBytes });
		}
	});

	it("works for every model that is measured, of which there are configs alone", async () => {
		const configs = sharedPath("bench/configs", "arl plan of every model that is measured");
		if (configs === null) return;
		for (const [name, parameters] of [
			["qwen2.5-0.5b", 494_032_768],
			["qwen3-0.6b", 596_049_920],
			["qwen3-1.7b", 1_720_574_976],
			["qwen3-4b", 4_022_468_096],
			["qwen3-8b", 8_190_735_360],
			["qwen3-cpu-30m", 33_564_160],
			["qwen3-cpu-8m", 6_819_456],
		] as const) {
			const words = ["--model_name_or_path", join(configs, name), "--tokens", "4096", "--sequences", "4"];
			for (const device of ["cpu", "cuda"]) {
				const planned = await planOf([...words, "--device", device]);
				expect(planned.parameters, name).toBe(parameters);
				// Weights, gradients and two moments in f32; in bf16 the weights are 2 + 2 bytes.
				const state = planned.categories.filter(({ name }) => /weights|gradients|moments/.test(name));
				expect(state.reduce((sum, { bytes }) => sum + bytes, 0)).toBe(16 * parameters);
			}
		}
	}, 60_000);

	it("says which GPUs it fits, and what each change would save: as much as planning with it shows", async () => {
		const large = wide(36);
		const planned = await planOf([
			"--model_name_or_path",
			large,
			"--device",
			"cuda",
			"--tokens",
			"4096",
			"--sequences",
			"4",
		]);
		for (const { gigabytes, fits } of planned.gpus) {
			expect(fits).toBe(planned.totalBytes + planned.contextBytes <= gigabytes * GB);
		}
		expect(planned.gpus.map(({ gigabytes }) => gigabytes)).toEqual([24, 40, 48, 80, 141]);
		const others: Record<string, Partial<EngineOptions>> = {
			"--gradient_checkpointing block": { recompute: "block" },
			"--activation_offloading": { activationOffloading: true },
			"--optimizer_offload": { optimizerOffload: true },
			"--loss_seq_chunk_size 256": { lossSeqChunkSize: 256 },
			"--bf16_stochastic_round": { stochasticRounding: true },
			"--bf16_moments": { bf16Moments: true },
			"--per_device_train_batch_size 2": { maxTokens: 2048, maxSequences: 2 },
		};
		expect(planned.changes.map(({ flags }) => flags).sort()).toEqual(Object.keys(others).sort());
		for (const { flags, savedBytes, totalBytes, hostBytes } of planned.changes) {
			expect({ totalBytes, hostBytes }, flags).toEqual({
				totalBytes: core(large, others[flags] ?? {}).totalBytes,
				hostBytes: core(large, others[flags] ?? {}).hostBytes,
			});
			expect(savedBytes).toBe(planned.totalBytes - totalBytes);
		}
		const saved = planned.changes.map(({ savedBytes }) => savedBytes);
		expect(saved).toEqual([...saved].sort((a, b) => b - a));
		const { totalBytes, hostBytes } = core(large, Object.assign({}, ...Object.values(others)));
		expect(planned.together).toEqual({ totalBytes, hostBytes });
	});

	it("counts what cuDNN's attention works in, and says what the own kernels would save", async () => {
		const large = wide(36);
		const size = ["--tokens", "65536", "--sequences", "16"];
		const words = ["--model_name_or_path", large, "--device", "cuda", ...size];
		const planned = await planOf([...words, "--attention", "auto"]);
		const own = core(large, { maxTokens: 65536, maxSequences: 16, attention: "own" });
		expect(planned.totalBytes).toBeGreaterThan(own.totalBytes);
		expect(planned.changes.find(({ flags }) => flags === "--attention own")).toMatchObject({
			totalBytes: own.totalBytes,
			savedBytes: planned.totalBytes - own.totalBytes,
		});
		expect((await planOf(words)).totalBytes).toBe(own.totalBytes);
	});

	it("shows tables for people, with advice only where it is needed", async () => {
		const large = await plan(["--model_name_or_path", wide(36), "--device", "cuda", "--max_length", "1024"]);
		expect(large.stderr).toMatch(/^the memory of the GPU is unknown: no NVIDIA driver/);
		expect(large.stdout).toContain(
			"bf16, gradient_checkpointing norms; micro-batches of up to 8,192 tokens in 8 sequences",
		);
		expect(large.stdout).toMatch(/^GPU memory +GiB +share\n {2}weights +15\.26 +\d+\.\d %$/m);
		expect(large.stdout).toMatch(/^ {2}total +\d+\.\d\d +100\.0 %$/m);
		expect(large.stdout).toMatch(/^ {3}24 GB {2}does not fit: .* GiB too much$/m);
		// All of it but three slots of 16 Mi parameters, of 10 bytes each.
		expect(large.stdout).toMatch(/^ {2}--optimizer_offload +75\.81 +.* and 76\.28 GiB in host memory$/m);
		const small = await plan(["--model_name_or_path", model, "--device", "cuda", "--max_length", "1024"]);
		expect(small.stdout).toMatch(/^ {3}24 GB {2}fits$/m);
		expect(small.stdout).not.toContain("what to change");
		const host = await plan([
			"--model_name_or_path",
			model,
			"--device",
			"cuda",
			"--tokens",
			"100",
			"--optimizer_offload",
		]);
		expect(host.stdout).toMatch(/^host memory +GiB +share\n {2}master weights .*\n {2}moments/m);
	});

	it("tells that offloading has no effect on the CPU, and plans without it", async () => {
		const words = ["--model_name_or_path", model, "--device", "cpu", "--tokens", "256"];
		const { stderr, stdout } = await plan([...words, "--optimizer_offload", "--activation_offloading", "--json"]);
		expect(stderr).toContain(
			"activation_offloading has no effect on the CPU: everything is in the host's memory already\n",
		);
		expect(stderr).toContain("optimizer_offload has no effect on the CPU");
		expect(JSON.parse(stdout)).toMatchObject({ hostBytes: 0, totalBytes: (await planOf(words)).totalBytes });
	});

	it("refuses a device, a count of tokens and a folder that are none, by name", async () => {
		const wrong = await plan(["--model_name_or_path", model, "--device", "tpu"]);
		expect(wrong.stderr).toContain('ARL_CONFIG device: "tpu" (a flag); expected auto, cpu, cuda or cuda:N');
		expect(wrong.code).toBe(2);
		const tokens = await plan(["--model_name_or_path", model, "--tokens", "0"]);
		expect(tokens.stderr).toContain("ARL_USAGE --tokens: 0; expected a whole number, 1 or more and at most 2147483647");
		expect(tokens.code).toBe(2);
		const many = await plan(["--model_name_or_path", model, "--max_length", "3000000000"]);
		expect(many.stderr).toContain("ARL_USAGE a micro-batch of 24000000000 tokens is too large");
		const none = await plan(["--model_name_or_path", join(folder, "nowhere")]);
		expect(none.stderr).toContain("does not exist");
	});

	it.runIf(cudaSystem)(
		"compares with the memory of the GPU that is there, and does not load anything on it",
		async () => {
			const cuda = fakeCuda(folder);
			const words = ["--model_name_or_path", wide(36), "--device", "cuda", "--tokens", "4096", "--sequences", "4"];
			const env = onlyIn(folder, [cuda], { FAKE_CUDA_GPUS: H100 });
			const { stdout, code } = await plan(words, env);
			expect(code).toBe(0);
			expect(stdout).toContain("training on cuda:0 (NVIDIA H100): bf16");
			expect(stdout).toMatch(/^does not fit this machine, .* GiB too much: 79\.0 GiB of 80\.0 GiB available$/m);
			const json = await planOf([...words, "--optimizer_offload"], env);
			expect(json).toMatchObject({ device: "cuda:0", deviceMemory: { name: "NVIDIA H100", fits: true }, changes: [] });
			const other = await plan([...words.slice(0, 2), "--device", "cuda:3"], env);
			expect(other.stderr).toContain("ARL_DEVICE device cuda:3: there is no such GPU");
		},
	);
});

describe("the device that a plan is for", () => {
	it("is the CPU or a GPU as a run would choose it, and a GPU that is not there only where it is named", async () => {
		const native = fakeNative();
		expect(deviceToPlan("auto", native)).toMatchObject({ device: "cpu", notice: null });
		const named = deviceToPlan("cuda:2", native);
		expect(named).toMatchObject({ device: "cuda:2", info: undefined });
		expect(named.notice).toContain("no NVIDIA driver");
		const gpu = {
			device: "cuda:0",
			name: "GPU",
			uuid: "1",
			capability: "9.0",
			memoryBytes: 80e9,
			availableBytes: 79e9,
		};
		const find = () => ({ report: { devices: [gpu], libraries: [] }, addon: null, problem: null });
		expect(deviceToPlan("auto", native, find)).toMatchObject({ device: "cuda:0", info: { availableBytes: 79e9 } });
		expect(await errorOf(() => deviceToPlan("cuda:1", native, find))).toMatchObject({ code: "ARL_DEVICE" });
	});
});
