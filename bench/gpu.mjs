// What only a GPU can show: checks first, times second, one JSON line a case. Stops at the first wrong number.
//
//   npm run build:cuda && node bench/gpu.mjs [--device cuda] [--only NAME] [--configs DIR] [--tokens 16384] [--seq 2048]
//                                            [--steps 6] [--budget SECONDS]
//
// Checks, on the small models of __test__/golden (and two of --configs with heads for tensor cores) from random weights: losses and gradient norms of three steps beside the
// CPU's (f32 within 1e-5, bf16 within 1e-2), the same bits on a second run, and the same bits with recomputation and both
// offloads. Times: the models of --configs in bf16, random weights; model FLOPs are 6 x parameters of the matrix products
// + attention's, recomputation not counted. `--device cpu` rehearses all of it without a GPU.

import { existsSync, readdirSync } from "node:fs";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { chooseDevice } from "../dist/device.js";
import { loadNative } from "../dist/native.js";

const root = fileURLToPath(new URL("..", import.meta.url));
const { values: a } = parseArgs({
	options: {
		device: { type: "string", default: "cuda" },
		only: { type: "string", default: "" },
		configs: { type: "string", default: join(root, "..", "shared", "bench", "configs") },
		tokens: { type: "string", default: "16384" },
		seq: { type: "string", default: "2048" },
		steps: { type: "string", default: "6" },
		budget: { type: "string", default: "540" },
	},
});
const deadline = performance.now() + Number(a.budget) * 1000;
const cpu = loadNative();
const chosen = orStop(() => chooseDevice(a.device, cpu));
const machine = {
	device: chosen.info?.name,
	memory_gib: Number(((chosen.info?.memoryBytes ?? 0) / 2 ** 30).toFixed(1)),
};

/** Dense BF16 on tensor cores without sparsity, in TFLOP/s, as NVIDIA's data sheets say. */
const PEAKS = [
	[/H100|H200/, 989],
	[/A100/, 312],
];
const peak = PEAKS.find(([name]) => name.test(machine.device ?? ""))?.[1];

/** What `make` gives; where there is no such device, a sentence and the end. */
function orStop(make) {
	try {
		return make();
	} catch (error) {
		console.error(`${error.message}. ${error.hint}`);
		return process.exit(1);
	}
}

function print(line) {
	console.log(JSON.stringify({ ...line, ...machine }));
}

function wanted(name) {
	return name.includes(a.only) && performance.now() < deadline;
}

/** Repeatable ids, all of them trained. */
function batch(tokens, seq, vocab, seed) {
	let state = seed;
	const id = () => {
		state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
		return Math.floor((state / 2 ** 32) * vocab);
	};
	const inputIds = Int32Array.from({ length: tokens }, id);
	const targets = inputIds.map((_, t) => inputIds[t % seq === seq - 1 ? t + 1 - seq : t + 1]);
	const positions = Int32Array.from({ length: tokens }, (_, t) => t % seq);
	const cuSeqlens = Int32Array.from({ length: tokens / seq + 1 }, (_, s) => s * seq);
	return { inputIds, targets, positions, cuSeqlens };
}

/** Opens an engine with random weights, hands it to `use`, and closes it. */
async function withEngine(native, device, modelDir, size, options, use) {
	const engine = await native.Engine.open({
		modelDir,
		initFromConfig: true,
		seed: 0,
		device,
		dtype: "bf16",
		recompute: "norms",
		maxTokens: size.tokens,
		maxSequences: size.tokens / size.seq,
		adamBeta1: 0.9,
		adamBeta2: 0.95,
		adamEpsilon: 1e-8,
		weightDecay: 0.1,
		...options,
	});
	try {
		return await use(engine);
	} finally {
		await engine.close();
	}
}

/** Losses and gradient norms of a few steps. */
function steps(native, device, dir, options, count = 3) {
	const size = { tokens: 48, seq: 12 };
	return withEngine(native, device, dir, size, options, async (engine) => {
		const { vocabSize } = engine.info();
		const found = [];
		for (let i = 0; i < count; i++) {
			const micro = [batch(48, 12, vocabSize, i + 1), batch(36, 12, vocabSize, i + 91)];
			const { loss, gradNorm } = await engine.step(micro, { learningRate: 1e-2, maxGradNorm: 1 });
			found.push(loss, gradNorm);
		}
		return found;
	});
}

function apart(found, expected) {
	return Math.max(...found.map((value, i) => Math.abs(value - expected[i]) / Math.abs(expected[i])));
}

async function check(name, dir) {
	for (const [dtype, bound] of [
		["f32", 1e-5],
		["bf16", 1e-2],
	]) {
		const run = (options = {}) => steps(chosen.native, chosen.device, dir, { dtype, ...options });
		const found = await run();
		const error = apart(found, await steps(cpu, "cpu", dir, { dtype }));
		const again = apart(await run(), found);
		const offloads = { recompute: "block", activationOffloading: true, optimizerOffload: true };
		const offloaded = apart(await run(offloads), found);
		const ok = error <= bound && again === 0 && offloaded === 0;
		print({ check: name, dtype, ok, beside_cpu: error, second_run: again, recompute_and_offload: offloaded });
		if (!ok) throw new Error(`${name} in ${dtype} is wrong; nothing is timed`);
	}
}

async function time(name, dir, options) {
	const size = { tokens: Number(a.tokens), seq: Number(a.seq) };
	await withEngine(chosen.native, chosen.device, dir, size, options, async (engine) => {
		const info = engine.info();
		const seconds = [];
		for (let i = 0; i < Number(a.steps) + 2; i++) {
			const stats = await engine.step([batch(size.tokens, size.seq, info.vocabSize, i + 1)], {
				learningRate: 1e-5,
				maxGradNorm: 1,
			});
			if (i >= 2) seconds.push(stats.seconds);
		}
		const median = seconds.sort((x, y) => x - y)[seconds.length >> 1];
		const tflops = ((info.flopsPerToken + info.attentionFlops * size.seq) * size.tokens) / median / 1e12;
		const { totalBytes, hostBytes } = await engine.memory();
		print({
			time: name,
			...options,
			...size,
			step_s: Number(median.toFixed(4)),
			tokens_per_s: Math.round(size.tokens / median),
			model_tflops: Number(tflops.toFixed(2)),
			...(peak && { mfu: Number((tflops / peak).toFixed(3)) }),
			planned_gib: Number((totalBytes / 2 ** 30).toFixed(2)),
			host_gib: Number((hostBytes / 2 ** 30).toFixed(2)),
		});
	});
}

const cases = [
	["qwen2.5-0.5b", {}],
	["qwen3-0.6b", {}],
	["qwen3-1.7b", {}],
	["qwen3-4b", { recompute: "block" }],
	["qwen3-4b", { recompute: "block", activationOffloading: true }],
	["qwen3-8b", { recompute: "block", activationOffloading: true, optimizerOffload: true }],
];

async function main() {
	const golden = join(root, "__test__", "golden");
	const small = readdirSync(golden).map((name) => join(golden, name));
	// Heads of 64 and of 128 elements, which run on tensor cores.
	const tensorCores = ["qwen3-cpu-30m", "qwen3-0.6b"].map((name) => join(a.configs, name));
	for (const dir of [...small.sort(), ...tensorCores]) {
		const name = basename(dir);
		if (existsSync(join(dir, "config.json")) && wanted(`check ${name}`)) await check(name, dir);
	}
	for (const [name, options] of cases) {
		const dir = join(a.configs, name);
		if (existsSync(dir) && wanted(`time ${name}`)) await time(name, dir, options);
	}
}

main().catch((error) => {
	console.error(`${error.message}${error.hint ? ` ${error.hint}` : ""}`);
	process.exitCode = 1;
});
