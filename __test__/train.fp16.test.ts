/** Training in float16: skipped steps are counted and reported, the schedule waits for them, and a run resumes to equal bits. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { QwenTrainer } from "../src/api/trainer.js";
import { createSchedule } from "../src/run/loop/schedules.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, differingFiles, flags, metricsOf, type Place, tinyPlace } from "./support/real.js";
import { events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();

describe("a step that float16 cannot compute", () => {
	/** Calls 1 and 4 are skipped: of one the gradients overflow, of the other the loss itself. */
	const skips = (call: number) => ({ 1: { loss: 2 }, 4: { loss: Number.NaN } })[call];
	const options: Options = { fp16: true, lr_scheduler_type: "linear", warmup_steps: 2, learning_rate: 1e-2 };

	it("is reported, counted, and moves neither the weights nor the schedule", async () => {
		const place = workspace(folder);
		const all = await events(trainer(place, options, fakeNative({ skips })));
		const steps = ofType(all, "step");
		expect(steps.map(({ skipped }) => skipped)).toEqual([true, false, false, true, false, false, false, false]);
		expect(steps.map(({ skippedSteps }) => skippedSteps)).toEqual([1, 1, 1, 2, 2, 2, 2, 2]);
		expect(steps.map(({ lossScale }) => lossScale)).toEqual([65536, 32768, 32768, 32768, 16384, 16384, 16384, 16384]);
		const schedule = createSchedule({
			name: "linear",
			learningRate: 1e-2,
			warmupSteps: 2,
			totalSteps: 8,
			kwargs: {},
		});
		expect(steps.map(({ learningRate }) => learningRate)).toEqual(
			[0, 0, 1, 2, 2, 3, 4, 5].map((step) => schedule(step)),
		);
		expect(ofType(all, "notice").map(({ message }) => message)).toEqual([
			"step 1 is skipped: the gradient's norm is Infinity at a loss scale of 65536; the next one's is 32768",
			"step 4 is skipped: the loss is NaN at a loss scale of 32768; the next one's is 16384",
		]);
		const log = metricsOf(place.out);
		expect(log.map(({ loss_scale, skipped_steps }) => [loss_scale, skipped_steps])).toEqual(
			steps.map(({ lossScale, skippedSteps }) => [lossScale, skippedSteps]),
		);
	});

	it("leaves the means of a log window, and of the run, without a loss that is no number", async () => {
		const place = workspace(folder);
		const all = await events(trainer(place, { ...options, logging_steps: 8 }, fakeNative({ skips })));
		const losses = ofType(all, "step").map(({ loss }) => loss);
		const finite = losses.filter(Number.isFinite);
		// As in Hugging Face's Trainer it counts as the mean of those before.
		const before = losses.slice(0, 3).reduce((sum, loss) => sum + loss, 0) / 3;
		const mean = (finite.reduce((sum, loss) => sum + loss, 0) + before) / 8;
		const metrics = ofType(all, "log")[0]?.metrics;
		expect(metrics?.loss).toBeCloseTo(mean, 12);
		expect(metrics?.entropy).toBeGreaterThan(0);
		expect(ofType(all, "end")[0]?.trainLoss).toBeCloseTo(mean, 12);
	});

	it("is remembered by a resumed run: the schedule stays behind", async () => {
		const place = workspace(folder);
		const whole = { ...place, out: `${place.out}-whole` };
		const saving: Options = { ...options, save_strategy: "steps", save_steps: 2 };
		const all = await events(
			trainer(whole, saving, fakeNative({ skips: (call) => (call === 1 ? skips(1) : undefined) })),
		);
		const dying = fakeNative({
			skips: (call) => (call === 1 ? skips(1) : undefined),
			onStep: (step) => {
				if (step === 4) throw new Error("killed");
				return undefined;
			},
		});
		await errorOf(trainer(place, saving, dying).train());
		const rest = await events(trainer(place, { ...saving, resume_from_checkpoint: "latest" }));
		const rates = (some: typeof all) => ofType(some, "step").map(({ learningRate }) => learningRate);
		expect(rates(rest)).toEqual(rates(all).slice(4));
		expect(ofType(rest, "step").at(-1)?.skippedSteps ?? 1).toBe(1);
		const other = await errorOf(trainer(place, { ...saving, fp16: false, resume_from_checkpoint: "latest" }).train());
		expect(other.message).toContain("fp16: true -> none");
	});
});

describe("float16 on the engine", () => {
	const short = {
		fp16: true,
		init_from_config: true,
		per_device_train_batch_size: 1,
		gradient_accumulation_steps: 2,
		max_steps: 12,
		learning_rate: 1e-2,
		logging_steps: 1,
	};

	/** Such a run, with a checkpoint half-way. */
	const saving = ({ model, file }: Place, out: string, more: Options = {}) => {
		const rows = { model_name_or_path: model, train_file: file, output_dir: out };
		return new QwenTrainer({ args: { ...rows, ...short, save_strategy: "steps", save_steps: 6, ...more } });
	};

	it("trains, and prints its loss scale", async () => {
		const place = tinyPlace(folder);
		const words = { model_name_or_path: place.model, train_file: place.file, output_dir: place.out, ...short };
		const { code, stdout, stderr } = await arl(["train", ...flags(words)]);
		expect(`${stderr}${code}`).toMatch(/0$/);
		expect(`${stdout}${stderr}`).toMatch(/loss_scale \d+/);
		const log = metricsOf(place.out);
		expect(log).toHaveLength(12);
		// Halved once for each step before that was skipped.
		for (const [i, { loss_scale = Number.NaN }] of log.entries()) {
			expect(loss_scale).toBe(65536 / 2 ** (log[i - 1]?.skipped_steps ?? 0));
		}
		expect(log.at(-1)?.loss).toBeLessThan(log[0]?.loss ?? Number.NaN);
		expect(existsSync(join(place.out, "model.safetensors"))).toBe(true);
	}, 60_000);

	it("resumes from a checkpoint to equal bits, its loss scale included", async () => {
		const place = tinyPlace(folder);
		const run = (out: string, more?: Options) => saving(place, out, more);
		const whole = `${place.out}-whole`;
		const expected = await events(run(whole));
		const rest = await events(
			run(place.out, { resume_from_checkpoint: join(whole, "checkpoint-6"), save_total_limit: 1 }),
		);
		expect(numbers(rest)).toEqual(numbers(expected).slice(6));
		const scales = (all: typeof rest) => ofType(all, "step").map(({ lossScale }) => lossScale);
		expect(scales(rest)).toEqual(scales(expected).slice(6));
		expect(differingFiles(join(whole, "checkpoint-12"), join(place.out, "checkpoint-12"))).toEqual([]);
	}, 60_000);

	it("trains bfloat16 without master weights and with moments in bfloat16, and resumes to equal bits", async () => {
		const place = tinyPlace(folder);
		const run = (out: string, more?: Options) =>
			saving(place, out, { fp16: false, bf16: true, bf16_stochastic_round: true, bf16_moments: true, ...more });
		const whole = `${place.out}-whole`;
		const expected = await events(run(whole));
		const start = ofType(expected, "start")[0];
		const bytes = new Map(start?.memory.categories.map((category) => [category.name, category.bytes]));
		expect(bytes.has("master weights")).toBe(false);
		expect(bytes.get("moments")).toBe(bytes.get("gradients"));
		const rest = await events(run(place.out, { resume_from_checkpoint: join(whole, "checkpoint-6") }));
		expect(numbers(rest)).toEqual(numbers(expected).slice(6));
		expect(differingFiles(join(whole, "checkpoint-12"), join(place.out, "checkpoint-12"))).toEqual([]);
		const other = await errorOf(
			run(`${place.out}-other`, {
				resume_from_checkpoint: join(whole, "checkpoint-6"),
				bf16_stochastic_round: false,
				bf16_moments: false,
			}).train(),
		);
		expect(other.message).toContain("bf16_stochastic_round: true -> none");
		expect(other.message).toContain("bf16_moments: true -> none");
	}, 60_000);
});
