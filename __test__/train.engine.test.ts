import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { QwenTrainer, type TrainerControl } from "../src/api/trainer.js";
import type { AgentTrainingConfigInput } from "../src/config/schema.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, contents, differingFiles, flags, type Place, tinyPlace } from "./support/real.js";
import { events, numbers, ofType } from "./support/run.js";

const folder = temporaryFolder();

function run(place: Place, options: Partial<AgentTrainingConfigInput> = {}): QwenTrainer {
	const args = {
		model_name_or_path: place.model,
		train_file: place.file,
		output_dir: place.out,
		init_from_config: true,
		gradient_accumulation_steps: 2,
		num_train_epochs: 1,
		learning_rate: 1e-2,
		logging_steps: 1,
		save_strategy: "no" as const,
		...(options.max_tokens_per_micro_batch === undefined && { per_device_train_batch_size: 4 }),
		...options,
	};
	return new QwenTrainer({ args });
}

describe("the trainer on the engine", () => {
	it("lowers the loss", async () => {
		const losses = numbers(await events(run(tinyPlace(folder), { num_train_epochs: 6 }))).map(({ loss }) => loss);
		expect(losses.at(-1) ?? Number.NaN).toBeLessThan((losses[0] ?? Number.NaN) * 0.8);
	});

	it("saves the state of the step after which it is stopped or asked to, though the next one is on its way", async () => {
		const place = tinyPlace(folder);
		const options = { max_steps: 5, save_strategy: "steps" as const };
		const at = (name: string, save_steps: number) =>
			run({ ...place, out: `${place.out}-${name}` }, { ...options, save_steps });
		await at("saved", 3).train();
		const after3 = (what: "stop" | "save") => ({
			onStep: ({ step }: { step: number }, control: TrainerControl) => void (step === 3 && control[what]()),
		});
		const stopped = new QwenTrainer({ args: at("stopped", 100).args, callbacks: [after3("stop")] });
		expect(await stopped.train()).toMatchObject({ outcome: "stopped", steps: 3 });
		const asked = new QwenTrainer({ args: at("asked", 100).args, callbacks: [after3("save")] });
		expect(await asked.train()).toMatchObject({ outcome: "completed", steps: 5 });
		const checkpoint = (name: string, step: number) => join(`${place.out}-${name}`, `checkpoint-${step}`);
		for (const name of ["stopped", "asked"])
			expect(differingFiles(checkpoint("saved", 3), checkpoint(name, 3))).toEqual([]);
		expect(differingFiles(checkpoint("saved", 5), checkpoint("asked", 5))).toEqual([]);
	});

	it("gives the same loss for the same samples of a step, whether they are packed, apart, or one by one", async () => {
		const place = tinyPlace(folder, 16);
		const first = async (name: string, options: Partial<AgentTrainingConfigInput>) => {
			const all = await events(run({ ...place, out: `${place.out}-${name}` }, { ...options, max_steps: 2 }));
			return ofType(all, "step").map(({ loss, gradNorm, tokens }) => ({ loss, gradNorm, tokens }));
		};
		// Each way, a step is all sixteen rows.
		const apart = await first("apart", { per_device_train_batch_size: 4, gradient_accumulation_steps: 4 });
		const single = await first("single", { per_device_train_batch_size: 1, gradient_accumulation_steps: 16 });
		const packed = await first("packed", { max_tokens_per_micro_batch: 2000, gradient_accumulation_steps: 16 });
		for (const other of [single, packed]) {
			for (const [i, step] of apart.entries()) {
				expect(other[i]?.tokens).toBe(step.tokens);
				expect(other[i]?.loss).toBeCloseTo(step.loss, 5);
				expect(other[i]?.gradNorm).toBeCloseTo(step.gradNorm, 4);
			}
		}
	});

	it("gives equal bits whatever is computed again in the backward pass", async () => {
		const place = tinyPlace(folder);
		const levels = ["off", "norms", "mlp", "block"] as const;
		const runs = levels.map(async (level) => {
			const options = { gradient_checkpointing: level, max_steps: 4 };
			return numbers(await events(run({ ...place, out: `${place.out}-${level}` }, options)));
		});
		const [off, ...others] = await Promise.all(runs);
		for (const other of others) expect(other).toEqual(off);
	});

	it("gives equal bits in two runs, and whether rows were ready before or not", async () => {
		const place = tinyPlace(folder);
		const outs = ["a", "b", "c"].map((name) => `${place.out}-${name}`);
		const all = await Promise.all(
			outs.map((out, i) =>
				events(run({ ...place, out }, { preprocess_seconds: i === 2 ? 0 : 20, save_strategy: "epoch" })),
			),
		);
		const [a, b, c] = all.map(numbers);
		expect(b).toEqual(a);
		expect(c).toEqual(a);
		const checkpoint = readdirSync(outs[0] as string).find((name) => name.startsWith("checkpoint-")) as string;
		for (const out of outs.slice(1)) {
			expect(differingFiles(join(outs[0] as string, checkpoint), join(out, checkpoint))).toEqual([]);
		}
	});

	it("resumes from a checkpoint mid-epoch, with another save_steps, to equal bits in losses, weights and moments", async () => {
		const place = tinyPlace(folder);
		const whole = `${place.out}-whole`;
		const options = { num_train_epochs: 2, save_strategy: "steps" as const, save_steps: 3 };
		const expected = await events(run({ ...place, out: whole }, options));
		const stopping = run(place, options);
		const controller = new AbortController();
		for await (const event of stopping.run({ signal: controller.signal })) {
			if (event.type === "step" && event.step === 5) controller.abort();
		}
		expect(existsSync(join(place.out, "checkpoint-5"))).toBe(true);
		const rest = await events(run(place, { ...options, save_steps: 4, resume_from_checkpoint: "latest" }));
		expect(numbers(rest)).toEqual(numbers(expected).slice(5));
		const last = `checkpoint-${numbers(expected).length}`;
		expect(differingFiles(join(whole, last), join(place.out, last))).toEqual([]);
	});

	it("takes its first step before the rows are all encoded, where it may", async () => {
		const place = tinyPlace(folder, 2000);
		let stepsBefore = 0;
		for await (const event of run(place, { preprocess_seconds: 0 }).run()) {
			if (event.type === "step") stepsBefore += 1;
			if (event.type !== "fill" || !event.complete) continue;
			expect(event).toMatchObject({ rows: 2000, totalRows: 2000 });
			break;
		}
		expect(stepsBefore).toBeGreaterThan(0);
	});

	it("leaves a folder that can be trained further", async () => {
		const place = tinyPlace(folder);
		await run(place).train();
		const next = await events(
			run({ ...place, model: place.out, out: `${place.out}-next` }, { init_from_config: false }),
		);
		expect(next.at(-1)).toMatchObject({ type: "end", outcome: "completed" });
	});

	it("trains in bf16, with packing, recomputing and a small loss chunk", async () => {
		const place = tinyPlace(folder);
		const options = { bf16: true, max_tokens_per_micro_batch: 600, gradient_checkpointing: "block" as const };
		const all = await events(run(place, { ...options, loss_seq_chunk_size: 7, num_train_epochs: 3 }));
		const losses = numbers(all).map(({ loss }) => loss);
		expect(losses.at(-1) ?? Number.NaN).toBeLessThan(losses[0] ?? Number.NaN);
	});

	it("refuses a folder without weights unless it is asked for random ones", async () => {
		const place = tinyPlace(folder);
		const error = await errorOf(run(place, { init_from_config: false }).train());
		expect(error).toMatchObject({ code: "ARL_WEIGHTS", exitCode: 3 });
		expect(existsSync(place.out)).toBe(false);
	});
});

describe("arl train as a process", () => {
	it("saves at SIGINT, leaves with 130, and resumes to equal bits", async () => {
		const place = tinyPlace(folder, 200);
		const whole = `${place.out}-whole`;
		const command = (out: string, more: Record<string, string> = {}) => [
			"train",
			...flags({
				model_name_or_path: place.model,
				train_file: place.file,
				output_dir: out,
				init_from_config: true,
				per_device_train_batch_size: 2,
				num_train_epochs: 3,
				save_strategy: "no",
				logging_steps: 1,
				...more,
			}),
		];
		const full = await arl(command(whole));
		expect(full.code, full.stderr).toBe(0);
		const stopped = await arl(command(place.out), (kill) => {
			const watch = setInterval(() => {
				const path = join(place.out, "metrics.jsonl");
				if (!existsSync(path) || readFileSync(path, "utf8").split("\n").length < 4) return;
				clearInterval(watch);
				kill("SIGINT");
			}, 5);
		});
		expect(stopped.code, stopped.stderr).toBe(130);
		expect(readdirSync(place.out).filter((name) => name.startsWith("checkpoint-"))).toHaveLength(1);
		const resumed = await arl(command(place.out, { resume_from_checkpoint: "latest" }));
		expect(resumed.code, resumed.stderr).toBe(0);
		const weights = (out: string) => readFileSync(join(out, "model.safetensors"));
		expect(weights(place.out).equals(weights(whole))).toBe(true);
	}, 60_000);

	it("survives a disk that refuses in the middle of a save: the last good checkpoint remains", async () => {
		const place = tinyPlace(folder);
		const command = (more: Record<string, string | number>) => [
			"train",
			...flags({
				model_name_or_path: place.model,
				train_file: place.file,
				output_dir: place.out,
				init_from_config: true,
				per_device_train_batch_size: 4,
				lr_scheduler_type: "constant",
				save_steps: 5,
				...more,
			}),
		];
		const first = await arl(command({ max_steps: 10 }));
		expect(first.code, first.stderr).toBe(0);
		const before = contents(join(place.out, "checkpoint-10"));
		// The exported model passes this bound on a file's size; the moments do not.
		const second = await arl(command({ max_steps: 20, resume_from_checkpoint: "latest" }), undefined, 128);
		expect(second.code).toBe(1);
		expect(second.stderr).toContain("ARL_IO");
		expect(second.stderr).toContain(join(place.out, "checkpoint-15"));
		expect(second.stderr).toContain(`resume from it`);
		expect(readdirSync(place.out).filter((name) => name.includes("checkpoint"))).toEqual([
			"checkpoint-10",
			"checkpoint-5",
		]);
		expect(contents(join(place.out, "checkpoint-10"))).toEqual(before);
		const third = await arl(command({ max_steps: 20, resume_from_checkpoint: "latest" }));
		expect(third.code, third.stderr).toBe(0);
	}, 60_000);
});
