/** What PEFT makes of an adapter that was trained here. */
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { QwenTrainer } from "../src/api/trainer.js";
import { main } from "../src/cli/commands.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { tinyPlace } from "./support/real.js";
import { pythonWith } from "./support/trackers.js";

const folder = temporaryFolder();
const output = capturedOutput();
const python = pythonWith("peft", "PEFT loads adapters");

const KINDS = {
	lora: ["--lora_target_modules", "all-linear"],
	some: ["--lora_target_modules", "q_proj", "v_proj", "mlp.down_proj", "--use_rslora"],
	dora: ["--lora_target_modules", "all-linear", "--use_dora", "--lora_dropout", "0"],
	saved: ["--lora_target_modules", "q_proj", "--lora_modules_to_save", "lm_head"],
};

interface Line {
	moved: number;
	apart: number;
	unknown: string[];
}

describe.skipIf(python === null)("PEFT", () => {
	it("loads every kind of adapter without a name that it misses or does not know, and has the merged model's logits", async () => {
		const place = tinyPlace(folder, 40);
		const base = join(folder, "base");
		const args = { train_file: place.file, max_steps: 1, save_strategy: "no" as const };
		await new QwenTrainer({
			args: { ...args, model_name_or_path: place.model, output_dir: base, init_from_config: true },
		}).train();
		const run = async (words: string[]) => expect(await main(words), output.stderr).toBe(0);
		const pairs: string[] = [];
		for (const [kind, options] of Object.entries(KINDS)) {
			const [adapter, merged] = [join(folder, kind), join(folder, `${kind}-merged`)];
			const from = ["--model_name_or_path", base];
			await run([
				...["train", ...from, "--train_file", place.file, "--output_dir", adapter, "--device", "cpu"],
				...["--max_steps", "6", "--learning_rate", "1e-2", "--use_peft", "--lora_r", "3", ...options],
			]);
			await run(["merge", ...from, "--adapter", adapter, "--output_dir", merged, "--dtype", "f32"]);
			pairs.push(adapter, merged);
		}
		const script = fileURLToPath(new URL("support/peft_logits.py", import.meta.url));
		const { status, stdout, stderr } = spawnSync(String(python), [script, base, ...pairs], { encoding: "utf8" });
		expect(status, stderr).toBe(0);
		const lines = stdout
			.trim()
			.split("\n")
			.map((line) => JSON.parse(line) as Line);
		expect(lines).toHaveLength(Object.keys(KINDS).length);
		for (const { moved, apart, unknown } of lines) {
			expect(unknown).toEqual([]);
			expect(moved).toBeGreaterThan(1e-3);
			expect(apart).toBeLessThan(1e-4 * Math.max(1, moved));
		}
	}, 120_000);
});
