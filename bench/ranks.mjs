// Several ranks next to one: weak scaling (each rank has as many tokens as one alone) and strong scaling (all together have),
// on 2 ranks of one thread, 1 rank of one thread and 1 rank of two, and the time that communication takes. Then the same step on two
// ranks that divide the model or its tokens. One JSON line a case.
//
//   node bench/ranks.mjs [--config DIR] [--tokens 1024] [--seq 256] [--steps 5] [--warmup 2] [--rounds 1] [--dtype f32]
//
// `--config bench/configs/qwen3-moe-cpu-17m` has experts, which two ranks divide in a case more.
// A micro-batch has so many tokens; a step of one rank alone has as many micro-batches as all ranks have in the strong case.
// `communication_s` is the part of a step that rank 0 spends in MPI, waiting for others included.

import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const root = fileURLToPath(new URL("..", import.meta.url));
const { values: a } = parseArgs({
	options: {
		config: { type: "string", default: join(root, "..", "shared", "bench", "configs", "qwen3-cpu-8m") },
		tokens: { type: "string", default: "1024" },
		seq: { type: "string", default: "256" },
		steps: { type: "string", default: "5" },
		warmup: { type: "string", default: "2" },
		rounds: { type: "string", default: "1" },
		dtype: { type: "string", default: "f32" },
		// What follows is for one rank of a case.
		case: { type: "string" },
		micro: { type: "string" },
		threads: { type: "string" },
		zero: { type: "string" },
		mesh: { type: "string" },
	},
});
const [tokens, seq, steps, warmup] = [a.tokens, a.seq, a.steps, a.warmup].map(Number);

const hasExperts = "num_experts" in JSON.parse(readFileSync(join(a.config, "config.json"), "utf8"));

/**
 * What is measured: ranks, threads of each, and micro-batches of a step. `zero` null: one rank that sums as it likes. `mesh`: what two
 * ranks divide.
 */
const CASES = [
	{ name: "one rank, one thread", ranks: 1, threads: 1, micro: 2, zero: null },
	{ name: "one rank, two threads", ranks: 1, threads: 2, micro: 2, zero: null },
	{ name: "one rank, two threads, ordered sums", ranks: 1, threads: 2, micro: 2, zero: 0 },
	...[0, 1, 2].flatMap((zero) => [
		{ name: "strong: the same step on two ranks", ranks: 2, threads: 1, micro: 2, zero },
		{ name: "weak: twice the step on two ranks", ranks: 2, threads: 1, micro: 4, zero },
	]),
	{ name: "weights in pieces", ranks: 2, threads: 1, micro: 2, zero: 3 },
	...[
		{ name: "heads and columns on two ranks", mesh: "tpSize" },
		{ name: "tokens on two ranks", mesh: "cpSize" },
		{ name: "layers on two ranks", mesh: "ppSize" },
		...(hasExperts ? [{ name: "experts on two ranks", mesh: "epSize" }] : []),
	].map((divided) => ({ ...divided, ranks: 2, threads: 1, micro: 2, zero: 2 })),
];

/** Runs every case, each in processes of its own. */
async function all() {
	const { installMpi } = await import("../scripts/mpi.mjs");
	const { findMpirun, mpirunArguments } = await import("../dist/launch/mpi.js");
	const { mpiruns, reason } = installMpi();
	if (mpiruns.length === 0) throw new Error(`no mpirun: ${reason}`);
	const mpirun = findMpirun(join(mpiruns[0], ".."));
	for (let round = 0; round < Number(a.rounds); round++) {
		for (const { name, ranks, threads, micro, zero, mesh } of CASES) {
			const options = { case: name, micro, threads, ...(zero !== null && { zero }), ...(mesh && { mesh }) };
			const own = Object.entries({ ...a, ...options }).flatMap(([key, value]) => [`--${key}`, String(value)]);
			const command = [process.execPath, fileURLToPath(import.meta.url), ...own];
			const [file, ...args] =
				ranks === 1 ? command : [mpirun.file, ...mpirunArguments(mpirun, ranks, process.getuid?.() === 0), ...command];
			const { status, stdout } = spawnSync(file, args, { encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
			if (status !== 0) throw new Error(`${name} ended with ${status}`);
			process.stdout.write(stdout);
		}
	}
}

/** One rank of a case. */
async function one() {
	const { loadNative } = await import("../dist/native.js");
	const { launchOf } = await import("../dist/launch/launch.js");
	const { mpiLibraries } = await import("../dist/launch/mpi.js");
	const { NO_HOOKS } = await import("../dist/ranks/open.js");
	const { dataPlace } = await import("../dist/ranks/batches.js");
	Object.assign(process.env, { ...NO_HOOKS, ...process.env });
	const { rank, world, launcher } = launchOf(process.env);
	const native = loadNative();
	const ranks = world > 1 ? await native.Ranks.open(mpiLibraries(launcher, process.env), rank, world, launcher) : null;
	const zero = a.zero === undefined ? null : Number(a.zero);
	const mesh = a.mesh === undefined ? {} : { [a.mesh]: world };
	const data = dataPlace(rank, world, mesh);
	const options = {
		modelDir: a.config,
		initFromConfig: true,
		seed: 0,
		device: "cpu",
		dtype: a.dtype,
		recompute: "norms",
		maxTokens: tokens,
		maxSequences: tokens / seq,
		adamBeta1: 0.9,
		adamBeta2: 0.95,
		adamEpsilon: 1e-8,
		weightDecay: 0.1,
		threads: Number(a.threads),
		...(zero !== null && { dataParallel: data.size, zero, rank, ...mesh }),
	};
	const engine = await native.Engine.open(options);
	if (ranks !== null) await engine.joinRanks(ranks);
	const { vocabSize } = engine.info();
	let state = data.place + 1;
	const random = (below) => {
		state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
		return Math.floor((state / 2 ** 32) * below);
	};
	const batch = () => {
		const inputIds = Int32Array.from({ length: tokens }, () => random(vocabSize));
		const targets = inputIds.map((_, t) => inputIds[t % seq === seq - 1 ? t + 1 - seq : t + 1]);
		const positions = Int32Array.from({ length: tokens }, (_, t) => t % seq);
		return {
			inputIds,
			targets,
			positions,
			cuSeqlens: Int32Array.from({ length: tokens / seq + 1 }, (_, s) => s * seq),
		};
	};
	const mine = Number(a.micro) / data.size;
	const seconds = [];
	const spent = [];
	for (let step = 0; step < steps + warmup; step++) {
		const before = ranks?.spent() ?? 0;
		const start = performance.now();
		await engine.step(Array.from({ length: mine }, batch), { learningRate: 1e-5, maxGradNorm: 1 });
		if (step < warmup) continue;
		seconds.push((performance.now() - start) / 1000);
		spent.push((ranks?.spent() ?? 0) - before);
	}
	const median = (values) => values.sort((x, y) => x - y)[values.length >> 1];
	const round = (x) => Number(x.toFixed(4));
	const ofStep = tokens * Number(a.micro);
	const sent = world > 1 ? native.planTraffic(options, mine) : { gradients: 0, sums: 0, weights: 0, tokens: 0 };
	const figures = {
		case: a.case,
		config: a.config.split("/").at(-1),
		dtype: a.dtype,
		ranks: world,
		threads: Number(a.threads),
		zero,
		...(a.mesh !== undefined && { mesh: a.mesh }),
		tokens: ofStep,
		step_s: round(median(seconds)),
		tokens_per_s: round(ofStep / median(seconds)),
		communication_s: round(median(spent)),
		sent_mib: round((sent.gradients + sent.sums + sent.weights + sent.replicas + sent.tokens) / 2 ** 20),
		memory_mib: round((await engine.memory()).totalBytes / 2 ** 20),
	};
	if (rank === 0) console.log(JSON.stringify(figures));
	await engine.close();
	await ranks?.close();
}

await (a.case === undefined ? all() : one());
