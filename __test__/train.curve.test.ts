import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { arl, metricsOf, sharedPath } from "./support/real.js";

const folder = temporaryFolder();
const golden = sharedPath("golden/sft-curve", "the loss curve of TRL");

interface Curve {
	log: {
		step: number;
		loss: number;
		grad_norm: number;
		learning_rate: number;
		mean_token_accuracy: number;
		num_tokens: number;
	}[];
}

describe.skipIf(golden === null)("the loss curve of TRL, through the command line with TRL's own names", () => {
	const curve: Curve = golden === null ? { log: [] } : JSON.parse(readFileSync(join(golden, "curve.json"), "utf8"));
	const run = async (name: string, more: string[] = []) => {
		const out = join(folder, name);
		const flags = [
			...["--model_name_or_path", join(golden ?? "", "model"), "--train_file", join(golden ?? "", "train.jsonl")],
			...["--output_dir", out, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "3"],
			...["--learning_rate", "2e-3", "--lr_scheduler_type", "linear", "--warmup_steps", "4"],
			...["--weight_decay", "0.01", "--max_grad_norm", "1.0", "--num_train_epochs", "2"],
			...["--max_length", "384", "--truncation", "right", "--train_sampling_strategy", "sequential"],
			...["--save_strategy", "no", "--logging_steps", "1", "--bf16", "false", "--seed", "3"],
		];
		const ended = await arl(["train", ...flags, ...more]);
		expect(ended.code, ended.stderr).toBe(0);
		return metricsOf(out);
	};

	it("loss, gradient norm, token accuracy and learning rate agree within 1e-3 at every step, tokens exactly", async () => {
		const metrics = await run("sft");
		expect(metrics.map(({ step }) => step)).toEqual(curve.log.map(({ step }) => step));
		for (const [i, expected] of curve.log.entries()) {
			const found = metrics[i] ?? {};
			for (const name of ["loss", "grad_norm", "mean_token_accuracy", "learning_rate"] as const) {
				expect(Math.abs((found[name] ?? Number.NaN) - expected[name]), `${name} of step ${expected.step}`).toBeLessThan(
					1e-3,
				);
			}
			expect(found.num_tokens).toBe(expected.num_tokens);
			expect(found.epoch).toBeCloseTo(expected.step / 10, 12);
		}
	}, 120_000);

	it("recomputing the whole block changes no digit", async () => {
		const off = await run("off", ["--gradient_checkpointing", "off", "--max_steps", "4"]);
		const block = await run("block", ["--gradient_checkpointing", "block", "--max_steps", "4"]);
		const digits = (lines: Record<string, number>[]) => lines.map(({ loss, grad_norm }) => [loss, grad_norm]);
		expect(digits(block)).toEqual(digits(off));
	}, 120_000);
});
