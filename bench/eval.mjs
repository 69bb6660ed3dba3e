// What evaluating while training costs: `arl train` on rows of the sample, alone and with the same rows evaluated four times,
// taken in turn. One JSON line a round: the time that evaluation adds, as a share of the run's, next to its tokens' share of
// those that are trained; and the time that is neither training nor evaluating.
//
//   node bench/eval.mjs [--rows 600] [--rounds 2]

import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { root, setup } from "../scripts/setup.mjs";

const EVALUATIONS = 4;
const BATCH = 8;
const { values: a } = parseArgs({
	options: { rows: { type: "string", default: "600" }, rounds: { type: "string", default: "2" } },
});
setup();
const folder = mkdtempSync(join(tmpdir(), "arl-bench-"));
const rows = join(folder, "rows.jsonl");
const lines = readFileSync(join(root, "assets", "train.jsonl"), "utf8")
	.split("\n")
	.slice(0, Number(a.rows));
writeFileSync(rows, lines.join("\n"));
const steps = Math.floor(lines.length / BATCH);

/** Trains every row once; `options` are added. Seconds of the process, and the records of its metrics. */
function train(options) {
	const out = join(folder, "out");
	const words = ["--model_name_or_path", join(root, "assets", "model"), "--train_file", rows, "--output_dir", out];
	words.push(
		"--per_device_train_batch_size",
		String(BATCH),
		"--save_strategy",
		"no",
		"--logging_steps",
		"1",
		"--seed",
		"7",
	);
	words.push("--max_steps", String(steps), "--gradient_checkpointing", "off", "--overwrite_output_dir");
	const start = performance.now();
	const run = spawnSync(process.execPath, [join(root, "dist", "cli", "main.js"), "train", ...words, ...options], {
		cwd: folder,
		stdio: ["ignore", "ignore", "pipe"],
		encoding: "utf8",
	});
	const seconds = (performance.now() - start) / 1000;
	if (run.status !== 0) throw new Error(`arl train ended with ${run.status}: ${run.stderr}`);
	const metrics = readFileSync(join(out, "metrics.jsonl"), "utf8").trim().split("\n");
	return { seconds, records: metrics.map((line) => JSON.parse(line)) };
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const round = (value) => Number(value.toFixed(4));
for (let i = 0; i < Number(a.rounds); i++) {
	const alone = train([]);
	const every = String(Math.floor(steps / EVALUATIONS));
	const both = train(["--eval_file", rows, "--eval_strategy", "steps", "--eval_steps", every]);
	const evaluated = both.records.filter((record) => record.eval_runtime !== undefined);
	const trained = alone.records.filter((record) => record.step_seconds !== undefined);
	const added = both.seconds - alone.seconds;
	const evaluating = sum(evaluated.map((record) => record.eval_runtime));
	const figures = {
		steps,
		trained_s: round(sum(trained.map((record) => record.step_seconds))),
		alone_s: round(alone.seconds),
		with_evaluation_s: round(both.seconds),
		evaluating_s: round(evaluating),
		// Each evaluation has the tokens of the whole run.
		tokens_share: evaluated.length,
		time_share: round(added / alone.seconds),
		beyond_evaluating_share: round((added - evaluating) / alone.seconds),
	};
	console.log(JSON.stringify(figures));
}
rmSync(folder, { recursive: true });
