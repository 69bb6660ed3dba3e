/** Adapters of low rank on the real core: what a run with one writes, resumes, merges and answers. */
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { QwenTrainer } from "../src/api/trainer.js";
import { main } from "../src/cli/commands.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { differingFiles, flags, metricsOf, type Place, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const output = capturedOutput();
let place: Place;

const json = (...path: string[]) => JSON.parse(readFileSync(join(...path), "utf8"));

/** Runs a command, which must succeed. */
async function ok(words: string[]): Promise<void> {
	expect(await main(words), output.stderr).toBe(0);
}

function train(out: string, options: Record<string, string | number | boolean> = {}): string[] {
	const all = {
		model_name_or_path: place.model,
		train_file: place.file,
		output_dir: out,
		per_device_train_batch_size: 2,
		max_steps: 6,
		learning_rate: 1e-2,
		logging_steps: 1,
		save_steps: 2,
		device: "cpu",
		...options,
	};
	return ["train", ...flags(all)];
}

const LORA = { use_peft: true, lora_r: 3, lora_alpha: 6, lora_dropout: 0.1, lora_target_modules: "all-linear" };

beforeAll(async () => {
	const tiny = tinyPlace(folder, 40);
	// A model with weights: what one step of full training leaves.
	place = { ...tiny, model: join(folder, "base") };
	const args = {
		model_name_or_path: tiny.model,
		train_file: tiny.file,
		output_dir: place.model,
		init_from_config: true,
		max_steps: 1,
		save_strategy: "no" as const,
	};
	await new QwenTrainer({ args }).train();
}, 60_000);

describe("a run with an adapter", () => {
	it("writes a small folder as PEFT does, and resumes to the same bits", async () => {
		const whole = join(folder, "whole");
		await ok(train(whole, { ...LORA, save_total_limit: 3 }));
		expect(output.stderr).toContain(
			"layers with adapters: q_proj 2, k_proj 2, v_proj 2, o_proj 2, gate_proj 2, up_proj 2, down_proj 2",
		);
		const config = json(whole, "adapter_config.json");
		expect(config).toMatchObject({ peft_type: "LORA", r: 3, lora_alpha: 6, lora_dropout: 0.1, bias: "none" });
		expect(config.target_modules).toHaveLength(14);
		expect(config.base_model_name_or_path).toBe(place.model);
		expect(readdirSync(join(whole, "checkpoint-4")).sort()).toEqual([
			"adapter_config.json",
			"adapter_model.safetensors",
			"arl",
			"chat_template.jinja",
			"tokenizer.json",
			"tokenizer_config.json",
		]);
		const out = join(folder, "part");
		await ok(train(out, { ...LORA, save_total_limit: 3 }));
		rmSync(join(out, "checkpoint-4"), { recursive: true });
		rmSync(join(out, "checkpoint-6"), { recursive: true });
		await ok(train(out, { ...LORA, save_total_limit: 3, resume_from_checkpoint: "latest" }));
		for (const name of ["checkpoint-4", "checkpoint-6"]) {
			expect(differingFiles(join(whole, name), join(out, name))).toEqual([]);
		}
		const numbers = (dir: string) => metricsOf(dir).map(({ step, loss, grad_norm }) => ({ step, loss, grad_norm }));
		expect(numbers(out)).toEqual(numbers(whole));
		const other = train(out, { ...LORA, lora_r: 4, resume_from_checkpoint: "latest" });
		expect(await main(other)).not.toBe(0);
		expect(output.stderr).toContain("configuration of the adapters");
	}, 120_000);

	it("is continued, merged at the end, and answers as the merged model does", async () => {
		const out = join(folder, "first");
		await ok(train(out, { ...LORA, lora_dropout: 0, save_strategy: "no", merge_adapter: true }));
		expect(existsSync(join(out, "merged", "config.json"))).toBe(true);
		expect(output.stderr).toContain(`use it   npx arl chat ${join(out, "merged")}\n`);
		expect(readFileSync(join(out, "report.html"), "utf8")).toContain(`vllm serve ${join(out, "merged")}`);
		const again = join(folder, "merged");
		await ok(["merge", ...flags({ model_name_or_path: place.model, adapter: out, output_dir: again })]);
		expect(differingFiles(again, join(out, "merged"))).toEqual([]);

		const reply = async (options: Record<string, string>) => {
			output.stdout = "";
			await ok(["generate", ...flags({ ...options, prompt: "What is 2 + 2?", max_new_tokens: 12, device: "cpu" })]);
			return output.stdout;
		};
		const adapted = await reply({ model_name_or_path: place.model, adapter: out });
		expect(adapted).toBe(await reply({ model_name_or_path: again }));

		const more = join(folder, "more");
		await ok(train(more, { adapter_name_or_path: out, max_steps: 1, learning_rate: 0, save_strategy: "no" }));
		expect(differingFiles(out, more).filter((file) => file.startsWith("adapter"))).toEqual([]);
	}, 120_000);

	it("merges the adapter of the best evaluation where that one is loaded at the end", async () => {
		const out = join(folder, "best");
		const every = { eval_strategy: "steps", eval_steps: 2, save_steps: 2, load_best_model_at_end: true };
		// The loss falls, and the greatest is asked for: an evaluation before the last step.
		const options = {
			...LORA,
			lora_dropout: 0,
			greater_is_better: true,
			eval_file: place.file,
			merge_adapter: true,
			...every,
		};
		await ok(train(out, options));
		const evaluated = metricsOf(out).filter(({ eval_loss: loss }) => loss !== undefined);
		const best = evaluated.reduce((most, line) => (Number(line.eval_loss) > Number(most.eval_loss) ? line : most));
		expect(best.step).toBeLessThan(6);
		const again = join(folder, "best-merged");
		const adapter = join(out, `checkpoint-${best.step}`);
		await ok(["merge", ...flags({ model_name_or_path: place.model, adapter, output_dir: again })]);
		expect(differingFiles(again, join(out, "merged"))).toEqual([]);
	}, 120_000);

	it("is trained next to weights in 4 bits, resumed to the same bits, and merged into the weights of the folder", async () => {
		const nested = { load_in_4bit: true, use_bnb_nested_quant: true };
		const [whole, part] = [join(folder, "nf4"), join(folder, "nf4-part")];
		await ok(train(whole, { ...LORA, ...nested, merge_adapter: true }));
		await ok(train(part, { ...LORA, ...nested, max_steps: 6, merge_adapter: true }));
		rmSync(join(part, "checkpoint-6"), { recursive: true });
		await ok(train(part, { ...LORA, ...nested, merge_adapter: true, resume_from_checkpoint: "latest" }));
		expect(differingFiles(join(whole, "checkpoint-6"), join(part, "checkpoint-6"))).toEqual([]);
		expect(json(whole, "merged", "config.json").quantization_config).toBeUndefined();
		const other = train(part, { ...LORA, resume_from_checkpoint: "latest" });
		expect(await main(other)).not.toBe(0);
		expect(output.stderr).toContain("load_in_4bit");
		const question = { prompt: "What is 2 + 2?", max_new_tokens: 4, device: "cpu" };
		await ok(["generate", ...flags({ model_name_or_path: place.model, adapter: whole, ...nested, ...question })]);
	}, 120_000);

	it("trains magnitudes as well, and answers as the merged model does", async () => {
		const out = join(folder, "dora");
		const options = { ...LORA, use_dora: true, lora_dropout: 0, save_strategy: "no", merge_adapter: true };
		await ok(train(out, options));
		expect(json(out, "adapter_config.json").use_dora).toBe(true);
		const reply = async (given: Record<string, string>) => {
			output.stdout = "";
			await ok(["generate", ...flags({ ...given, prompt: "What is 2 + 2?", max_new_tokens: 8, device: "cpu" })]);
			return output.stdout;
		};
		const adapted = await reply({ model_name_or_path: place.model, adapter: out });
		expect(adapted).toBe(await reply({ model_name_or_path: join(out, "merged") }));
		expect(await main(train(join(folder, "dropped"), { ...options, lora_dropout: 0.1 }))).not.toBe(0);
		expect(output.stderr).toContain("use_dora: magnitudes next to lora_dropout are not built");
	}, 120_000);

	it("replaces its own merged folder, and no other", async () => {
		const out = join(folder, "replaced");
		const options = { ...LORA, max_steps: 1, save_strategy: "no", merge_adapter: true };
		await ok(train(out, options));
		await ok(train(out, { ...options, overwrite_output_dir: true }));
		const taken = join(folder, "taken");
		mkdirSync(join(taken, "merged"), { recursive: true });
		writeFileSync(join(taken, "merged", "notes.txt"), "mine");
		expect(await main(train(taken, { ...options, overwrite_output_dir: true }))).not.toBe(0);
		expect(output.stderr).toContain("merged exists, and this program did not write it there");
	}, 60_000);
});

describe("what has no meaning together", () => {
	const refused = async (options: Record<string, string | number | boolean>) => {
		output.stderr = "";
		expect(await main([...train(join(folder, "none"), options), "--print_config"])).not.toBe(0);
		return output.stderr;
	};

	it.each([
		[{ lora_r: 8 }, "lora_r 8 (a flag) has no meaning without use_peft"],
		[{ merge_adapter: true }, "merge_adapter true (a flag) has no meaning without use_peft"],
		[{ adapter_name_or_path: "a", lora_r: 8 }, "its adapter_config.json decides"],
		[{ use_peft: true, init_from_config: true }, "contradicts adapters"],
		[{ use_peft: true, bf16: true, bf16_stochastic_round: true }, "exact float32 masters"],
		[{ use_dora: true }, "use_dora true (a flag) has no meaning without use_peft"],
		[{ load_in_4bit: true }, "nothing else would be trained"],
		[{ use_peft: true, use_bnb_nested_quant: true }, "has no meaning without load_in_4bit"],
		[{ use_peft: true, load_in_8bit: true }, "weights in 8 bits are not built"],
	])("%j", async (options, message) => {
		expect(await refused(options as Record<string, string | number | boolean>)).toContain(message);
	});
});

describe("arl plan", () => {
	it("shows which layers get an adapter, and gradients and moments of these alone", async () => {
		const plan = async (options: Record<string, string | number | boolean>) => {
			output.stdout = "";
			await ok([
				"plan",
				"--json",
				...flags({ model_name_or_path: place.model, device: "cuda", max_length: 64, ...options }),
			]);
			return JSON.parse(output.stdout);
		};
		const [full, lora] = [await plan({}), await plan({ use_peft: true, lora_target_modules: "q_proj" })];
		const bytes = (of: { categories: { name: string; bytes: number }[] }, name: string) =>
			of.categories.find((category) => category.name === name)?.bytes ?? 0;
		expect(lora.adapted).toEqual([{ name: "q_proj", count: 2 }]);
		expect(lora.trainedParameters).toBe(2 * 16 * (16 + 16));
		expect(bytes(lora, "gradients")).toBeLessThan(bytes(full, "gradients") / 10);
		expect(full.adapted).toBe(null);
		const nested = { use_peft: true, load_in_4bit: true, use_bnb_nested_quant: true };
		const quantized = await plan(nested);
		expect(bytes(quantized, "weights in 4 bits")).toBeGreaterThan(0);
		expect(bytes(quantized, "weights in 4 bits") + bytes(quantized, "weights")).toBeLessThan(bytes(lora, "weights"));
		await ok(["plan", ...flags({ model_name_or_path: place.model, use_peft: true, max_length: 64 })]);
		expect(output.stdout).toContain("layers with adapters: q_proj 2, v_proj 2");
	});
});
