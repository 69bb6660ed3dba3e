// Makes `assets/model/model.safetensors`: random weights from a seed, pre-trained by `arl train` on plain text (notes.mjs).
// Run `make.mjs` first, and build `arl`. Takes some minutes.
//   node assets/make/pretrain.mjs [WORK_FOLDER]
import { execFileSync } from "node:child_process";
import { copyFileSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { randomWeights } from "./model.mjs";
import { makeNotes } from "./notes.mjs";

const NOTES = 120000;
const NOTES_SEED = 5;
const WEIGHTS_SEED = 3;

const assets = resolve(dirname(fileURLToPath(import.meta.url)), "..");
const model = join(assets, "model");

function main(work) {
	const start = join(work, "random");
	const output = join(work, "out");
	mkdirSync(start, { recursive: true });
	const config = JSON.parse(readFileSync(join(model, "config.json"), "utf8"));
	for (const name of readdirSync(model)) {
		if (!name.endsWith(".safetensors")) copyFileSync(join(model, name), join(start, name));
	}
	writeFileSync(join(start, "model.safetensors"), randomWeights(config, WEIGHTS_SEED));
	const notes = join(work, "notes.jsonl");
	writeFileSync(
		notes,
		makeNotes(NOTES, NOTES_SEED)
			.map((row) => `${JSON.stringify(row)}\n`)
			.join(""),
	);
	const settings = {
		model_name_or_path: start,
		train_file: notes,
		output_dir: output,
		overwrite_output_dir: true,
		num_train_epochs: 1,
		per_device_train_batch_size: 16,
		learning_rate: 3e-3,
		lr_scheduler_type: "cosine",
		warmup_steps: 75,
		adam_beta2: 0.95,
		gradient_checkpointing: "off",
		save_strategy: "no",
		logging_steps: 100,
		train_sampling_strategy: "sequential",
		seed: 1,
	};
	const words = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, String(value)]);
	execFileSync(process.execPath, [join(assets, "..", "dist", "cli", "main.js"), "train", ...words], {
		stdio: "inherit",
	});
	const weights = join(output, "model.safetensors");
	copyFileSync(weights, join(model, "model.safetensors"));
	console.log(`${statSync(weights).size} bytes of weights: ${join(model, "model.safetensors")}`);
}

main(process.argv[2] ? resolve(process.argv[2]) : mkdtempSync(join(tmpdir(), "arl-pretrain-")));
