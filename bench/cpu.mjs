// `npm run bench:cpu`: the training step on this machine's CPU, next to the machine's own best f32 matrix product and,
// where a Python with torch and transformers is there, next to the peer, all taken in turn in one run. One JSON line a
// figure, then one a case with the medians and ratios.
//
//   npm run bench:cpu -- [--rounds 3] [--config qwen3-cpu-30m] [--dtype f32] [--peer PYTHON] [--no-peer]
//
// The peer is the script `../shared/bench/hf_sft.py`, run by --peer, $ARL_PEER_PYTHON or python3.

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

const peerScript = join(root, "..", "shared", "bench", "hf_sft.py");
const peer =
	!a["no-peer"] &&
	existsSync(peerScript) &&
	spawnSync(a.peer, ["-c", "import torch, transformers"], { stdio: "ignore" }).status === 0;
if (!peer) console.error("bench: no peer (needs a Python with torch and transformers, and ../shared/bench)");

function line(command, args) {
	const result = spawnSync(command, args, { cwd: root, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
	if (result.status !== 0) throw new Error(`${command} ${args.join(" ")} failed`);
	const row = JSON.parse(result.stdout.trim().split("\n").at(-1));
	console.log(JSON.stringify(row));
	return row;
}
const median = (rows) => rows.sort((x, y) => x - y)[rows.length >> 1];
const ratio = (x, y) => Number((x / y).toFixed(3));

for (const config of a.config) {
	for (const dtype of a.dtype) {
		const ours = [];
		const theirs = [];
		const gemm = [];
		const first = [];
		for (let round = 0; round < Number(a.rounds); round++) {
			gemm.push(line(process.execPath, [join(root, "bench", "matmul.mjs")]).best_gflops);
			const dir = join(root, "bench", "configs", config);
			ours.push(
				line(process.execPath, [
					join(root, "bench", "step.mjs"),
					"--config",
					dir,
					"--dtype",
					dtype,
					"--steps",
					a.steps,
				]),
			);
			first.push(
				line(process.execPath, [join(root, "bench", "step.mjs"), "--config", dir, "--dtype", dtype, "--first"])
					.first_step_s,
			);
			if (peer) {
				const peerType = dtype === "f32" ? "fp32" : "bf16";
				theirs.push(
					line(a.peer, [
						peerScript,
						"--config",
						dir,
						"--dtype",
						peerType,
						"--tokens",
						"2048",
						"--seq",
						"512",
						"--device",
						"cpu",
						"--steps",
						a.steps,
						"--warmup",
						"2",
					]),
				);
			}
		}
		const gflops = median(ours.map((row) => row.model_gflops));
		const tokens = median(ours.map((row) => row.tokens_per_s));
		const memory = median(ours.map((row) => row.peak_gib));
		const best = Math.max(...gemm);
		const row = {
			case: `${config} ${dtype}`,
			tokens_per_s: tokens,
			model_gflops: gflops,
			best_gemm_gflops: best,
			of_best_gemm: ratio(gflops, best),
			peak_gib: memory,
			first_step_s: median(first),
		};
		if (peer) {
			row.peer_tokens_per_s = median(theirs.map((r) => r.tokens_per_s));
			row.peer_peak_gib = median(theirs.map((r) => r.peak_gib));
			row.speed_vs_peer = ratio(tokens, row.peer_tokens_per_s);
			row.memory_vs_peer = ratio(memory, row.peer_peak_gib);
		}
		console.log(JSON.stringify({ ...row, machine }));
	}
}
