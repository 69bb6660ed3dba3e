// `arl train` itself on a GPU, through Node: checks first, the loop's own share of a step last; one JSON line a case. Stops at the
// first one that fails.
//
//   npm run build:cuda && node bench/gpu-train.mjs [--device cuda] [--only NAME] [--configs DIR] [--model qwen3-0.6b]
//                                                  [--tokens 16384] [--steps 12]
//
// losses     the first ten steps' losses against the CPU's on the rows of assets (f32 within 1e-4, bf16 within 2e-2)
// resume     five steps, then five more from the checkpoint: the weights of ten steps in bits
// sigterm    SIGTERM in the middle of a run, which then resumes from what it saved: the weights in bits again
// memory     a micro-batch that does not fit: exit code 4 and the plan, before anything is loaded; and the same where such a
//            micro-batch comes in the middle of a run, whose last checkpoint remains
// nonfinite  a learning rate that is too high: exit code 5, and the batch is kept
// loop       seconds of a step in the trainer over those of the bare engine on the very same micro-batches (goal 1.02); both
//            submit each step before the statistics of the one before it are there
//
// `--device cpu` rehearses all of it without a GPU; give it --model qwen3-cpu-8m --tokens 1024 --steps 5.

import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { availableParallelism, cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { createTrainer } from "../dist/api/trainer.js";
import { chooseDevice } from "../dist/device/index.js";
import { loadNative } from "../dist/native.js";

const root = fileURLToPath(new URL("..", import.meta.url));
const { values: a } = parseArgs({
	options: {
		device: { type: "string", default: "cuda" },
		only: { type: "string", default: "" },
		configs: { type: "string", default: join(root, "..", "shared", "bench", "configs") },
		model: { type: "string", default: "qwen3-0.6b" },
		tokens: { type: "string", default: "16384" },
		steps: { type: "string", default: "12" },
	},
});
const work = mkdtempSync(join(tmpdir(), "arl-gpu-train-"));
const cpu = loadNative();
const chosen = orStop(() => chooseDevice(a.device, cpu));
const machine = {
	device: chosen.info?.name ?? `${cpus()[0]?.model} (${availableParallelism()} threads)`,
	node: process.version,
};

/** What `make` gives; where there is no such device, a sentence and the end. */
function orStop(make) {
	try {
		return make();
	} catch (error) {
		console.error(`${error.message}. ${error.hint}`);
		return process.exit(3);
	}
}

/** Prints a case; ends the program where it is wrong. */
function report(name, ok, figures) {
	console.log(JSON.stringify({ train: name, ok, ...figures, ...machine }));
	if (!ok) throw new Error(`${name} failed: nothing more is run`);
}

/** `arl train` in a process of its own. `during` is given its output folder and a way to send it a signal. */
async function train(name, options, during = async () => {}) {
	const out = join(work, name);
	const all = { output_dir: out, device: a.device, logging_steps: 1, ...options };
	const flags = Object.entries(all).flatMap(([key, value]) => [`--${key}`, String(value)]);
	const child = spawn(process.execPath, [join(root, "dist", "cli", "main.js"), "train", ...flags], {
		stdio: ["ignore", "ignore", "pipe"],
		env: { ...process.env, NO_COLOR: "1" },
	});
	let stderr = "";
	child.stderr.setEncoding("utf8").on("data", (text) => {
		stderr += text;
	});
	const ended = new Promise((resolve) => child.on("close", resolve));
	await Promise.race([during(out, (signal) => child.kill(signal)), ended]);
	return { out, code: await ended, stderr };
}

/** The same, where it has to succeed. */
async function trained(name, options) {
	const run = await train(name, options);
	if (run.code !== 0) throw new Error(`arl train (${name}) ended with ${run.code}: ${run.stderr}`);
	return run.out;
}

/** The lines of logged steps. */
const metricsOf = (out) =>
	existsSync(join(out, "metrics.jsonl"))
		? readFileSync(join(out, "metrics.jsonl"), "utf8")
				.trim()
				.split("\n")
				.filter(Boolean)
				.map((line) => JSON.parse(line))
				.filter(({ event }) => event === undefined)
		: [];
const weightsOf = (out) =>
	createHash("sha256")
		.update(readFileSync(join(out, "model.safetensors")))
		.digest("hex");
const checkpoints = (out) => readdirSync(out).filter((name) => name.startsWith("checkpoint-"));

/** Ten steps on the rows of assets. */
const ten = (dtype, more = {}) => ({
	model_name_or_path: join(root, "assets", "model"),
	train_file: join(root, "assets", "train.jsonl"),
	max_steps: 10,
	per_device_train_batch_size: 4,
	learning_rate: 1e-3,
	save_steps: 5,
	bf16: dtype === "bf16",
	...more,
});

async function losses() {
	for (const [dtype, bound] of [
		["f32", 1e-4],
		["bf16", 2e-2],
	]) {
		const expected = metricsOf(await trained(`cpu-${dtype}`, ten(dtype, { device: "cpu" })));
		const found = metricsOf(await trained(`ten-${dtype}`, ten(dtype)));
		const apart = Math.max(...expected.map(({ loss }, i) => Math.abs((found[i]?.loss ?? Number.NaN) - loss) / loss));
		const ok = expected.length === 10 && found.length === 10 && apart <= bound;
		report(`losses ${dtype}`, ok, { steps: 10, apart, bound, last: found.at(-1)?.loss });
	}
}

async function resume() {
	const whole = await trained("whole", ten("bf16"));
	const part = join(work, "resumed");
	mkdirSync(part);
	cpSync(join(whole, "checkpoint-5"), join(part, "checkpoint-5"), { recursive: true });
	const resumed = await trained("resumed", ten("bf16", { resume_from_checkpoint: "latest" }));
	report("resume", weightsOf(resumed) === weightsOf(whole), { from_step: 5, steps: 10 });
}

async function sigterm() {
	const steps = { max_steps: 60, save_strategy: "no" };
	const whole = await trained("uninterrupted", ten("bf16", steps));
	const stopped = await train("stopped", ten("bf16", steps), async (out, kill) => {
		while (metricsOf(out).length < 20) await sleep(5);
		kill("SIGTERM");
	});
	const [saved = "none"] = checkpoints(stopped.out);
	const goneOn = await trained("stopped", ten("bf16", { ...steps, resume_from_checkpoint: "latest" }));
	const ok = stopped.code !== 0 && saved !== "checkpoint-60" && weightsOf(goneOn) === weightsOf(whole);
	report("sigterm", ok, { exit_code: stopped.code, saved });
}

async function memory() {
	const short = readFileSync(join(root, "assets", "train.jsonl"), "utf8")
		.split("\n")
		.slice(0, 256);
	const reply = { role: "assistant", content: "word ".repeat(200_000) };
	const long = JSON.stringify({ messages: [{ role: "user", content: "long" }, reply] });
	const rows = join(work, "long.jsonl");
	const model = modelFolder("memory", "qwen3-cpu-8m");
	const options = { model_name_or_path: model, init_from_config: true, train_file: rows, truncation: "right" };
	const rest = { per_device_train_batch_size: 128, train_sampling_strategy: "sequential" };
	const told = (stderr) => stderr.split("\n").find((line) => /OOM/.test(line)) ?? stderr;

	writeFileSync(rows, `${long}\n`.repeat(128));
	const before = await train("memory", { ...options, ...rest, max_length: 40_000 });
	const nothing = !existsSync(join(before.out, "metrics.jsonl"));
	const planned = before.code === 4 && /ARL_OOM/.test(before.stderr) && /activations/.test(before.stderr) && nothing;
	report("memory before", planned, { exit_code: before.code, told: told(before.stderr) });

	writeFileSync(rows, `${short.join("\n")}\n${`${long}\n`.repeat(128)}`);
	const inside = await train("memory-inside", { ...options, ...rest, preprocess_seconds: 0, save_steps: 1 });
	const stands = checkpoints(inside.out).includes("checkpoint-2") && /checkpoint-2/.test(inside.stderr);
	const ok = inside.code === 4 && /step 3: /.test(inside.stderr) && /activations/.test(inside.stderr) && stands;
	report("memory in a step", ok, { exit_code: inside.code, told: told(inside.stderr) });
}

async function nonfinite() {
	const { code, out } = await train("nonfinite", ten("f32", { learning_rate: 1e38, max_grad_norm: 0 }));
	const kept = readdirSync(out).filter((name) => /^nonfinite-step-\d+\.json$/.test(name));
	report("nonfinite", code === 5 && kept.length === 1, { exit_code: code, kept: kept[0] });
}

/** A config of --configs with the tokenizer of assets, whose ids it knows. */
function modelFolder(name, config) {
	const folder = join(work, `${name}-model`);
	mkdirSync(folder);
	cpSync(join(a.configs, config, "config.json"), join(folder, "config.json"));
	for (const file of ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]) {
		cpSync(join(root, "assets", "model", file), join(folder, file));
	}
	return folder;
}

const median = (values) => [...values].sort((x, y) => x - y)[values.length >> 1];

/** `engine`, which counts in `seen.ahead` the steps that are submitted while the one before them is being finished. */
function watched(engine, seen) {
	let finishing = 0;
	return new Proxy(engine, {
		get: (target, key) => {
			const value = target[key];
			if (typeof value !== "function") return value;
			if (key === "submitStep")
				return (...values) => {
					seen.steps.push(values);
					if (finishing > 0) seen.ahead++;
					return value.apply(target, values);
				};
			if (key === "finishStep")
				return (ticket) => {
					finishing++;
					return value.call(target, ticket).finally(() => finishing--);
				};
			return (...values) => value.apply(target, values);
		},
	});
}

async function loop() {
	const [inTrainer, alone] = [0, 1].map(() => ({ steps: [], seconds: [], ahead: 0 }));
	let options = null;
	// Keeps what the trainer asks of the engine, to ask it of a bare one again.
	const open = async (given) => {
		options = given;
		return watched(await chosen.native.Engine.open(given), inTrainer);
	};
	const native = new Proxy(chosen.native, { get: (target, key) => (key === "Engine" ? { open } : target[key]) });
	const args = {
		model_name_or_path: modelFolder("loop", a.model),
		init_from_config: true,
		train_file: [join(root, "assets", "train.jsonl")],
		output_dir: join(work, "loop"),
		device: a.device,
		max_steps: Number(a.steps),
		max_tokens_per_micro_batch: Number(a.tokens),
		learning_rate: 1e-5,
		save_strategy: "no",
		logging_steps: 1,
	};
	for await (const event of createTrainer({ args }, () => native).run()) {
		if (event.type === "step") inTrainer.seconds.push(event.seconds);
	}
	const { steps } = inTrainer;
	const engine = watched(await chosen.native.Engine.open(options), alone);
	// As in the trainer, step N+1 is submitted before the statistics of step N are awaited. `finishStep` comes first, since it
	// queues the update of step N and the engine holds one submitted step.
	let submitted = engine.submitStep(...steps[0]);
	for (let number = 1; number <= steps.length; number++) {
		const finished = engine.finishStep(await submitted);
		if (number < steps.length) submitted = engine.submitStep(...steps[number]);
		alone.seconds.push((await finished).seconds);
	}
	await engine.close();
	// The first steps make plans and warm up.
	const [trainerStep, bareStep] = [inTrainer, alone].map(({ seconds }) => median(seconds.slice(2)));
	const ratio = trainerStep / bareStep;
	report("loop", steps.length === Number(a.steps) && alone.ahead === steps.length - 1, {
		model: a.model,
		tokens: Number(a.tokens),
		steps: steps.length,
		submitted_ahead: { trainer: inTrainer.ahead, bare: alone.ahead },
		trainer_step_s: Number(trainerStep.toFixed(5)),
		bare_step_s: Number(bareStep.toFixed(5)),
		ratio: Number(ratio.toFixed(4)),
		goal: 1.02,
		reached: ratio <= 1.02,
	});
}

try {
	for (const [name, run] of Object.entries({ losses, resume, sigterm, memory, nonfinite, loop })) {
		if (name.includes(a.only)) await run();
	}
} catch (error) {
	console.error(error.message);
	process.exitCode = 1;
} finally {
	rmSync(work, { recursive: true, force: true });
}
