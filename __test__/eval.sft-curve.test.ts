/** The loss of an evaluation on the real core, against TRL's own figures and against the loss of training. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it, vi } from "vitest";
import { run } from "../src/cli/train.js";
import { temporaryFolder } from "./support/folder.js";
import { flags, metricsOf, sharedPath } from "./support/real.js";

const golden = sharedPath("golden/sft-curve", "the loss of an evaluation against TRL's");
const folder = temporaryFolder();

/** The metrics of a run of one step at a learning rate of 0 on the golden model. */
async function metrics(name: string, options: Record<string, string | number | boolean>) {
	const out = join(folder, name);
	const all = {
		model_name_or_path: join(golden ?? "", "model"),
		train_file: join(golden ?? "", "train.jsonl"),
		output_dir: out,
		learning_rate: 0,
		max_steps: 1,
		max_length: 384,
		truncation: "right",
		train_sampling_strategy: "sequential",
		save_strategy: "no",
		logging_steps: 1,
		bf16: false,
		eval_on_start: true,
		...options,
	};
	vi.spyOn(process.stderr, "write").mockImplementation(() => true);
	try {
		expect(await run(flags(all))).toBe(0);
	} finally {
		vi.restoreAllMocks();
	}
	const lines = metricsOf(out);
	const [evaluated, trained] = [lines.find((line) => "eval_loss" in line), lines.find((line) => "loss" in line)];
	if (evaluated === undefined || trained === undefined) throw new Error("a line is missing");
	return { evaluated, trained };
}

describe.skipIf(golden === null)("the loss of an evaluation", () => {
	const rows = readFileSync(join(golden ?? "/dev", golden === null ? "null" : "train.jsonl"), "utf8")
		.trimEnd()
		.split("\n");

	it("is TRL's loss of the same rows within 1e-4", async () => {
		// TRL's first two steps have 12 rows each. The learning rate of the first is 0, so both see the weights of the beginning.
		const [first, second] = [join(folder, "first.jsonl"), join(folder, "second.jsonl")];
		writeFileSync(first, `${rows.slice(0, 12).join("\n")}\n`);
		writeFileSync(second, `${rows.slice(12, 24).join("\n")}\n`);
		const curve = JSON.parse(readFileSync(join(golden ?? "", "curve.json"), "utf8")) as {
			log: { loss: number; learning_rate: number }[];
		};
		expect(curve.log[0]?.learning_rate).toBe(0);
		const { evaluated } = await metrics("trl", { eval_file: first, per_device_train_batch_size: 1 });
		expect(Math.abs((evaluated.eval_loss ?? 0) - (curve.log[0]?.loss ?? 1))).toBeLessThan(1e-4);
		const other = await metrics("trl-second", { eval_file: second, per_device_train_batch_size: 1 });
		expect(Math.abs((other.evaluated.eval_loss ?? 0) - (curve.log[1]?.loss ?? 1))).toBeLessThan(1e-4);
	}, 120_000);

	it("is that of a training step over the same rows, and has the same bits for any batch size and for packing", async () => {
		const eval_file = join(golden ?? "", "train.jsonl");
		const one = await metrics("one", {
			eval_file,
			per_device_eval_batch_size: 1,
			per_device_train_batch_size: rows.length,
		});
		const { eval_loss, eval_mean_token_accuracy, eval_entropy } = one.evaluated;
		for (const [a, b] of [
			[eval_loss, one.trained.loss],
			[eval_mean_token_accuracy, one.trained.mean_token_accuracy],
			[eval_entropy, one.trained.entropy],
		] as const) {
			expect(Math.abs((a ?? 0) - (b ?? 1))).toBeLessThan(1e-9);
		}
		const figures = ({ evaluated }: typeof one) => {
			const { eval_runtime: _, eval_samples_per_second: __, ...rest } = evaluated;
			return rest;
		};
		for (const size of [7, 120]) {
			const other = await metrics(`size-${size}`, {
				eval_file,
				per_device_eval_batch_size: size,
				per_device_train_batch_size: 2,
			});
			expect(figures(other), `${size} at a time`).toEqual(figures(one));
		}
		const packed = await metrics("packed", { eval_file, max_tokens_per_micro_batch: 1000 });
		expect(figures(packed)).toEqual(figures(one));
	}, 240_000);
});
