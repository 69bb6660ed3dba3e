/** Evaluations and adapters of data-parallel runs on the real core: figures, best checkpoint and weights of one rank, in bits. */
import { readlinkSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { Mpirun } from "../src/launch/mpi.js";
import { temporaryFolder } from "./support/folder.js";
import { arlOnRanks, mpiruns } from "./support/ranks.js";
import { arl, contents, differingFiles, flags, metricsOf, root, tinyPlace } from "./support/real.js";

const found = mpiruns();
const first = found[0] as Mpirun;
const folder = temporaryFolder();
const place = tinyPlace(folder, 26);
/** A run takes a second or two on idle cores, and a launcher that does not start one gives up after a minute. */
const LIMIT = 300_000;

type Options = Record<string, string | number | boolean>;

/** 8 steps of four micro-batches, the last step of an epoch with one; an evaluation and a checkpoint after each second step. */
const COMMON: Options = {
	train_file: place.file,
	per_device_train_batch_size: 2,
	num_train_epochs: 2,
	learning_rate: 1e-2,
	max_length: 96,
	truncation: "left",
	logging_steps: 1,
	eval_file: join(root, "assets", "heldout.jsonl"),
	eval_strategy: "steps",
	eval_steps: 2,
	eval_generate: 2,
	eval_on_start: true,
	save_steps: 2,
	save_total_limit: 8,
	// The loss of a model that begins at random falls all the time; this metric goes up and down.
	metric_for_best_model: "entropy",
	load_best_model_at_end: true,
	threads: 1,
	device: "cpu",
};

const words = (out: string, options: Options) => ["train", ...flags({ ...COMMON, ...options, output_dir: out })];

/** What was logged, without what depends on time. */
const logged = (out: string) =>
	metricsOf(out).map((line) =>
		Object.fromEntries(Object.entries(line).filter(([name]) => !/runtime|second|gflops|rss/.test(name))),
	);

/** Runs on one rank with `full_determinism` and on two; expects the same figures, best link and checkpoints. Gives both folders. */
async function onOneAndTwo(name: string, options: Options): Promise<[string, string]> {
	const [one, two] = [join(folder, `${name}-1`), join(folder, `${name}-2`)];
	const alone = { ...options, full_determinism: true, gradient_accumulation_steps: 4 };
	const reference = await arl(words(one, alone));
	expect(reference.code, reference.stderr).toBe(0);
	const run = await arlOnRanks(first, 2, words(two, { ...options, gradient_accumulation_steps: 2 }));
	expect(run.code, run.stderr).toBe(0);
	expect(run.stderr).toContain("rank 0 of 2, ");
	expect(logged(two)).toEqual(logged(one));
	const evaluated = logged(two).filter((line) => "eval_loss" in line);
	expect(evaluated.map(({ step }) => step)).toEqual([0, 2, 4, 6, 8]);
	expect(new Set(evaluated.map(({ eval_loss }) => eval_loss)).size).toBe(5);
	expect(readlinkSync(join(two, "best"))).toBe(readlinkSync(join(one, "best")));
	for (const step of [2, 4, 6, 8]) {
		const differing = differingFiles(join(two, `checkpoint-${step}`), join(one, `checkpoint-${step}`));
		// The state to resume from is in pieces, because ranks divide moments.
		expect(differing.sort(), `step ${step}`).toEqual([
			"arl/engine.safetensors",
			"arl/state-00001-of-00002.safetensors",
			"arl/state-00002-of-00002.safetensors",
		]);
	}
	return [one, two];
}

describe.skipIf(found.length === 0)("two ranks have the bits of one", () => {
	it("in evaluations, generated replies, the best checkpoint and the weights", { timeout: LIMIT }, async () => {
		const [one, two] = await onOneAndTwo("full", { model_name_or_path: place.model, init_from_config: true });
		const model = contents(two).get("model.safetensors");
		expect(model?.length).toBeGreaterThan(1000);
		expect(model).toEqual(contents(one).get("model.safetensors"));
	});

	it("in the bytes of an adapter with dropout, over a base that they divide", { timeout: LIMIT }, async () => {
		const base = join(folder, "base");
		const options = {
			...COMMON,
			eval_strategy: "no",
			eval_on_start: false,
			load_best_model_at_end: false,
			max_steps: 1,
		};
		const made = await arl([
			"train",
			...flags({
				...options,
				eval_generate: 0,
				model_name_or_path: place.model,
				init_from_config: true,
				output_dir: base,
			}),
		]);
		expect(made.code, made.stderr).toBe(0);
		const lora = { use_peft: true, lora_r: 3, lora_alpha: 6, lora_dropout: 0.1, lora_target_modules: "all-linear" };
		// Rank 0 evaluates and generates with weights that the other sends it.
		const [one, two] = await onOneAndTwo("lora", { model_name_or_path: base, ...lora, zero: 3 });
		const adapter = contents(two).get("adapter_model.safetensors");
		expect(adapter?.length).toBeGreaterThan(1000);
		expect(adapter).toEqual(contents(one).get("adapter_model.safetensors"));
	});
});
