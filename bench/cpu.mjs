// `npm run bench:cpu`: the training step on this machine's CPU, next to the machine's own best f32 matrix product and,
// where a Python with torch and transformers is there, next to the peer, all taken in turn in one run. One JSON line a
// figure, then one a case with the medians and ratios.
//
//   npm run bench:cpu -- [--rounds 3] [--config qwen3-cpu-30m] [--dtype f32] [--tokens 2048] [--seq 512]... [--lora 16]
//                        [--peer PYTHON] [--no-peer]
//
// Several lengths of sequences are several cases. The peer is the script `../shared/bench/hf_sft.py`, and with --lora
// `bench/peft_step.py`, run by --peer, $ARL_PEER_PYTHON or python3.

import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { cpus, totalmem } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { root, setup } from "../scripts/setup.mjs";

const { values: a } = parseArgs({
	options: {
		rounds: { type: "string", default: "3" },
		config: { type: "string", multiple: true, default: ["qwen3-cpu-30m", "qwen3-cpu-8m"] },
		dtype: { type: "string", multiple: true, default: ["f32", "bf16"] },
		steps: { type: "string", default: "5" },
		tokens: { type: "string", default: "2048" },
		seq: { type: "string", multiple: true, default: ["512"] },
		lora: { type: "string" },
		peer: { type: "string", default: process.env.ARL_PEER_PYTHON ?? "python3" },
		"no-peer": { type: "boolean", default: false },
	},
});

setup();
const { loadNative } = await import("../dist/native.js");
const native = loadNative();
const machine = {
	cpu: cpus()[0]?.model.trim(),
	threads: cpus().length,
	memory_gib: Math.round(totalmem() / 2 ** 30),
	features: native.devices()[0].features.join(" "),
	node: process.version,
};

const peerScript = a.lora ? join(root, "bench", "peft_step.py") : join(root, "..", "shared", "bench", "hf_sft.py");
const peerModules = a.lora ? "torch, transformers, peft" : "torch, transformers";
const peer =
	!a["no-peer"] &&
	existsSync(peerScript) &&
	spawnSync(a.peer, ["-c", `import ${peerModules}`], { stdio: "ignore" }).status === 0;
if (!peer) console.error(`bench: no peer (needs a Python with ${peerModules}, and ${peerScript})`);

function line(command, args) {
	const result = spawnSync(command, args, { cwd: root, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
	if (result.status !== 0) throw new Error(`${command} ${args.join(" ")} failed`);
	const row = JSON.parse(result.stdout.trim().split("\n").at(-1));
	console.log(JSON.stringify(row));
	return row;
}
const median = (rows) => rows.sort((x, y) => x - y)[rows.length >> 1];
const ratio = (x, y) => Number((x / y).toFixed(3));

const cases = a.config.flatMap((config) => a.dtype.flatMap((dtype) => a.seq.map((seq) => ({ config, dtype, seq }))));
for (const { config, dtype, seq } of cases) {
	// A step has whole sequences.
	const tokens = String(Math.max(Number(a.tokens), Number(seq)));
	const work = ["--config", join(root, "bench", "configs", config), "--tokens", tokens, "--seq", seq];
	if (a.lora) work.push("--lora", a.lora);
	const step = [join(root, "bench", "step.mjs"), ...work, "--dtype", dtype];
	const peerType = dtype === "f32" ? "fp32" : "bf16";
	const peerStep = [peerScript, ...work, "--dtype", peerType, "--steps", a.steps, "--warmup", "2"];
	if (!a.lora) peerStep.push("--device", "cpu");
	const ours = [];
	const theirs = [];
	const gemm = [];
	const first = [];
	for (let round = 0; round < Number(a.rounds); round++) {
		gemm.push(line(process.execPath, [join(root, "bench", "matmul.mjs")]).best_gflops);
		ours.push(line(process.execPath, [...step, "--steps", a.steps]));
		first.push(line(process.execPath, [...step, "--first"]).first_step_s);
		if (peer) theirs.push(line(a.peer, peerStep));
	}
	const gflops = median(ours.map((row) => row.model_gflops));
	const rate = median(ours.map((row) => row.tokens_per_s));
	const memory = median(ours.map((row) => row.peak_gib));
	const best = Math.max(...gemm);
	const row = {
		case: `${config} ${dtype}${a.lora ? ` lora ${a.lora}` : ""}`,
		seq: Number(seq),
		tokens_per_s: rate,
		model_gflops: gflops,
		best_gemm_gflops: best,
		of_best_gemm: ratio(gflops, best),
		peak_gib: memory,
		first_step_s: median(first),
	};
	if (peer) {
		row.peer_tokens_per_s = median(theirs.map((r) => r.tokens_per_s));
		row.peer_peak_gib = median(theirs.map((r) => r.peak_gib));
		row.speed_vs_peer = ratio(rate, row.peer_tokens_per_s);
		row.memory_vs_peer = ratio(memory, row.peer_peak_gib);
	}
	console.log(JSON.stringify({ ...row, machine }));
}
