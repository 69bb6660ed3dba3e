// One process, one case: opens an engine with random weights, takes optimizer steps on random ids (every token trained,
// clip at 1.0, AdamW 0.9/0.95 with decay 0.1), and prints one JSON line. `bench/cpu.mjs` runs it next to the peer.
//
//   node bench/step.mjs --config DIR [--tokens 2048] [--seq 512] [--steps 8] [--warmup 2] [--dtype f32|bf16]
//                       [--recompute off|norms|mlp|block] [--threads N] [--lora RANK] [--first]
//
// --lora trains adapters of that rank on every linear layer instead of the model, without dropout. --first stops after the first step and reports the seconds from the start of the process.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { loadNative } from "../dist/native.js";

const { values: a } = parseArgs({
	options: {
		config: { type: "string" },
		tokens: { type: "string", default: "2048" },
		seq: { type: "string", default: "512" },
		steps: { type: "string", default: "8" },
		warmup: { type: "string", default: "2" },
		dtype: { type: "string", default: "f32" },
		recompute: { type: "string", default: "norms" },
		threads: { type: "string" },
		lora: { type: "string" },
		first: { type: "boolean", default: false },
	},
});
const tokens = Number(a.tokens);
const seq = Number(a.seq);
const steps = Number(a.steps);
const warmup = Number(a.warmup);

/** PEFT's configuration of adapters on every linear layer. */
const adapters = (r) => ({ peft_type: "LORA", r, lora_alpha: 2 * r, lora_dropout: 0, target_modules: "all-linear" });

const native = loadNative();
const engine = await native.Engine.open({
	modelDir: a.config,
	initFromConfig: true,
	seed: 0,
	device: "cpu",
	dtype: a.dtype,
	recompute: a.recompute,
	maxTokens: tokens,
	maxSequences: tokens / seq,
	adamBeta1: 0.9,
	adamBeta2: 0.95,
	adamEpsilon: 1e-8,
	weightDecay: 0.1,
	...(a.threads ? { threads: Number(a.threads) } : {}),
	...(a.lora ? { lora: JSON.stringify(adapters(Number(a.lora))) } : {}),
});
const info = engine.info();

let state = 1;
function random(below) {
	state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
	return Math.floor((state / 2 ** 32) * below);
}
function batch() {
	const inputIds = Int32Array.from({ length: tokens }, () => random(info.vocabSize));
	const targets = inputIds.map((_, t) => inputIds[t % seq === seq - 1 ? t + 1 - seq : t + 1]);
	const positions = Int32Array.from({ length: tokens }, (_, t) => t % seq);
	const cuSeqlens = Int32Array.from({ length: tokens / seq + 1 }, (_, s) => s * seq);
	return { inputIds, targets, positions, cuSeqlens };
}

const seconds = [];
const losses = [];
for (let step = 0; step < (a.first ? 1 : steps + warmup); step++) {
	const stats = await engine.step([batch()], { learningRate: 1e-5, maxGradNorm: 1 });
	losses.push(stats.loss);
	if (step >= warmup) seconds.push(stats.seconds);
}
const firstStepSeconds = a.first ? performance.now() / 1000 : undefined;

/** Peak resident memory in GiB, as the kernel counts it. */
function peakGib() {
	try {
		return Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]) / 2 ** 20;
	} catch {
		return process.resourceUsage().maxRSS / 2 ** 20;
	}
}
const round = (x, digits) => Number(x.toFixed(digits));
const median = seconds.sort((x, y) => x - y)[seconds.length >> 1];
const flops = (info.flopsPerToken + info.attentionFlops * seq) * tokens;
console.log(
	JSON.stringify({
		program: "arl",
		config: join(a.config).split("/").at(-1),
		device: info.device,
		dtype: a.dtype,
		recompute: a.recompute,
		...(a.lora ? { lora: Number(a.lora) } : {}),
		tokens,
		seq,
		...(a.first
			? { first_step_s: round(firstStepSeconds, 3) }
			: {
					step_s: round(median, 4),
					tokens_per_s: round(tokens / median, 1),
					model_gflops: round(flops / median / 1e9, 1),
				}),
		peak_gib: round(peakGib(), 3),
		first_loss: round(losses[0], 4),
		last_loss: round(losses.at(-1), 4),
	}),
);
await engine.close();
