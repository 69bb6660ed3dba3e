import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { run } from "../src/cli/train.js";
import { loadNative } from "../src/native.js";
import { metricsOf } from "./support/real.js";

const root = fileURLToPath(new URL("..", import.meta.url));
const golden = join(process.env.ARL_SHARED ?? resolve(root, "../shared"), "golden", "sft-curve");

function whyNot(): string | null {
	if (!existsSync(golden)) return `${golden} is missing`;
	try {
		loadNative();
		return null;
	} catch (error) {
		return `the addon is not built: ${error instanceof Error ? error.message : String(error)}`;
	}
}

const missing = whyNot();
if (missing !== null) process.stderr.write(`SKIPPED: TRL's curve through the command line: ${missing}\n`);

const folder = mkdtempSync(join(tmpdir(), "arl-curve-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
beforeEach(() => {
	vi.spyOn(process.stderr, "write").mockImplementation(() => true);
});
afterEach(() => vi.restoreAllMocks());

interface Line {
	step: number;
	loss: number;
	grad_norm: number;
	learning_rate: number;
	mean_token_accuracy: number;
	num_tokens: number;
}

describe.skipIf(missing !== null)("TRL's run with TRL's own flags", () => {
	it("has its loss, gradient norm, learning rate, token accuracy and token count at every step", async () => {
		const curve = JSON.parse(readFileSync(join(golden, "curve.json"), "utf8")) as { log: Line[] };
		const flags = `--model_name_or_path ${golden}/model --train_file ${golden}/train.jsonl --output_dir ${folder}/out
			--per_device_train_batch_size 4 --gradient_accumulation_steps 3 --learning_rate 2e-3 --lr_scheduler_type linear
			--warmup_steps 4 --weight_decay 0.01 --max_grad_norm 1.0 --num_train_epochs 2 --max_length 384 --truncation right
			--train_sampling_strategy sequential --save_strategy no --logging_steps 1 --bf16 false --seed 3`;
		expect(await run(flags.split(/\s+/))).toBe(0);
		const ours = metricsOf(join(folder, "out")) as unknown as Line[];
		expect(ours.map(({ step }) => step)).toEqual(curve.log.map(({ step }) => step));
		for (const [i, theirs] of curve.log.entries()) {
			const line = ours[i] as Line;
			const at = `step ${theirs.step}`;
			expect(Math.abs(line.loss - theirs.loss), `loss, ${at}`).toBeLessThan(1e-3);
			expect(Math.abs(line.grad_norm - theirs.grad_norm), `grad_norm, ${at}`).toBeLessThan(1e-3);
			expect(Math.abs(line.mean_token_accuracy - theirs.mean_token_accuracy), `accuracy, ${at}`).toBeLessThan(1e-3);
			expect(Math.abs(line.learning_rate - theirs.learning_rate), `learning_rate, ${at}`).toBeLessThan(1e-12);
			expect(line.num_tokens, `num_tokens, ${at}`).toBe(theirs.num_tokens);
		}
	}, 120_000);
});
