/** TRL's run with an adapter of PEFT, step by step, through the command line: the adapter goes in and comes out. */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { main } from "../src/cli/commands.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { metricsOf, sharedPath } from "./support/real.js";

const golden = sharedPath("golden/lora/lora-curve", "TRL's curve of an adapter through the command line");
const folder = temporaryFolder();
const output = capturedOutput();

interface Line {
	step: number;
	loss: number;
	grad_norm: number;
	learning_rate: number;
	mean_token_accuracy: number;
	num_tokens: number;
}

/** The tensors of a safetensors file of f32, by name. */
function tensors(path: string): Map<string, Float32Array> {
	const bytes = readFileSync(path);
	const start = 8 + Number(bytes.readBigUInt64LE(0));
	const header = JSON.parse(bytes.toString("utf8", 8, start)) as Record<string, { data_offsets: [number, number] }>;
	const entries = Object.entries(header).filter(([name]) => name !== "__metadata__");
	return new Map(
		entries.map(
			([
				name,
				{
					data_offsets: [from, to],
				},
			]) => {
				return [name, new Float32Array(Uint8Array.from(bytes.subarray(start + from, start + to)).buffer)];
			},
		),
	);
}

/** `|a - b| / |b|`. */
function apart(a: Float32Array, b: Float32Array): number {
	const square = (at: (i: number) => number) => b.reduce((sum, _, i) => sum + at(i) ** 2, 0);
	return Math.sqrt(square((i) => (a[i] ?? 0) - (b[i] ?? 0)) / square((i) => b[i] ?? 0));
}

describe.skipIf(golden === null)("TRL's run of an adapter with TRL's own flags", () => {
	it("has its loss, gradient norm, learning rate, token accuracy and token count at every step, and its adapter at the end", async () => {
		const curve = JSON.parse(readFileSync(join(String(golden), "curve.json"), "utf8")) as { log: Line[] };
		const out = join(folder, "out");
		// Two rows have no reply left after they are cut: TRL leaves them out by itself.
		const flags = `train --model_name_or_path ${golden}/model --train_file ${golden}/train.jsonl --output_dir ${out}
			--adapter_name_or_path ${golden}/adapter --per_device_train_batch_size 4 --gradient_accumulation_steps 3
			--learning_rate 2e-2 --lr_scheduler_type linear --warmup_steps 2 --max_grad_norm 1.0 --num_train_epochs 2
			--max_length 256 --truncation right --on_bad_row skip --train_sampling_strategy sequential --save_strategy no --logging_steps 1
			--bf16 false --seed 3`;
		expect(await main(flags.split(/\s+/)), output.stderr).toBe(0);
		expect(output.stderr).toContain("layers with adapters: q_proj 2, k_proj 2, v_proj 2, o_proj 2, gate_proj 2");
		const ours = metricsOf(out) as unknown as Line[];
		expect(ours.map(({ step }) => step)).toEqual(curve.log.map(({ step }) => step));
		for (const [i, theirs] of curve.log.entries()) {
			const line = ours[i] as Line;
			const at = `step ${theirs.step}`;
			expect(Math.abs(line.loss - theirs.loss), `loss, ${at}`).toBeLessThan(1e-4);
			expect(Math.abs(line.grad_norm - theirs.grad_norm), `grad_norm, ${at}`).toBeLessThan(1e-4);
			expect(Math.abs(line.mean_token_accuracy - theirs.mean_token_accuracy), `accuracy, ${at}`).toBeLessThan(1e-3);
			expect(Math.abs(line.learning_rate - theirs.learning_rate), `learning_rate, ${at}`).toBeLessThan(1e-12);
			expect(line.num_tokens, `num_tokens, ${at}`).toBe(theirs.num_tokens);
		}
		const [trained, theirs] = [out, `${golden}/adapter_trained`].map((dir) =>
			tensors(join(dir, "adapter_model.safetensors")),
		);
		expect([...(trained?.keys() ?? [])].sort()).toEqual([...(theirs?.keys() ?? [])].sort());
		for (const [name, expected] of theirs ?? []) {
			expect(apart(trained?.get(name) as Float32Array, expected), name).toBeLessThan(1e-3);
		}
		const [config, peft] = [out, `${golden}/adapter_trained`].map((dir) =>
			JSON.parse(readFileSync(join(dir, "adapter_config.json"), "utf8")),
		);
		for (const key of ["r", "lora_alpha", "target_modules", "bias", "task_type", "peft_type"]) {
			expect(config[key], key).toEqual(peft[key]);
		}
		expect(existsSync(join(out, "config.json"))).toBe(false);
		expect(existsSync(join(out, "tokenizer.json"))).toBe(true);
	}, 180_000);
});
