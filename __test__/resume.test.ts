import { appendFileSync, cpSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { type Faults, fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { metricsOf } from "./support/real.js";
import { chatRow, events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const SAVING: Options = { save_strategy: "steps", save_steps: 2 };
const weights = (path: string) => readFileSync(join(path, "model.safetensors"), "utf8");
const engineState = (path: string) => readFileSync(join(path, "arl", "engine.json"), "utf8");
const checkpoints = (out: string) =>
	readdirSync(out)
		.filter((name) => name.includes("checkpoint-"))
		.sort();

/** A run that dies in step `step`, as if its process had been killed there. */
async function dieAt(place: ReturnType<typeof workspace>, step: number, options: Options, faults: Faults = {}) {
	const native = fakeNative({
		...faults,
		onStep: (at) => {
			if (at === step) throw new Error("killed");
			return undefined;
		},
	});
	await trainer(place, options, native)
		.train()
		.catch(() => {});
}

describe("resuming", () => {
	it.each([
		["mid-epoch", {}, 4],
		["at an epoch's end", {}, 5],
		["with log windows across the checkpoint", { logging_steps: 3 }, 6],
		["packed", { max_tokens_per_micro_batch: 40, gradient_accumulation_steps: 2 }, 6],
		["a mixture", { train_weights: [1] }, 4],
		["sequentially", { train_sampling_strategy: "sequential" as const }, 7],
	] as [string, Options, number][])(
		"%s: the same numbers, weights and moments as the run never stopped",
		async (_, options, at) => {
			const place = workspace(folder);
			const whole = { ...place, out: `${place.out}-whole` };
			const all = await events(trainer(whole, { ...SAVING, ...options }));
			await dieAt(place, at, { ...SAVING, ...options });
			const rest = await events(trainer(place, { ...SAVING, ...options, resume_from_checkpoint: "latest" }));
			const resumedStep = ofType(rest, "resumed")[0]?.step ?? -1;
			expect(resumedStep).toBe(at - 1 - ((at - 1) % 2));
			expect(numbers(rest)).toEqual(numbers(all).filter(({ step }) => step > resumedStep));
			expect(metricsOf(place.out).map(({ step, loss }) => [step, loss])).toEqual(
				metricsOf(whole.out).map(({ step, loss }) => [step, loss]),
			);
			const last = checkpoints(whole.out).at(-1) as string;
			expect(engineState(join(place.out, last))).toBe(engineState(join(whole.out, last)));
			expect(weights(place.out)).toBe(weights(whole.out));
		},
	);

	it("may change save_steps, and says so", async () => {
		const place = workspace(folder);
		const whole = { ...place, out: `${place.out}-whole` };
		await events(trainer(whole, SAVING));
		await dieAt(place, 4, SAVING);
		const rest = await events(trainer(place, { ...SAVING, save_steps: 3, resume_from_checkpoint: "latest" }));
		expect(ofType(rest, "resumed")[0]?.changed).toEqual(["save_steps: 2 -> 3"]);
		expect(ofType(rest, "saved").map(({ step }) => step)).toEqual([3, 6, 8]);
		expect(weights(place.out)).toBe(weights(whole.out));
	});

	it("takes a folder by name, and resumes from another output_dir too", async () => {
		const place = workspace(folder);
		await events(trainer(place, SAVING));
		const other = { ...place, out: `${place.out}-other` };
		const rest = await events(trainer(other, { ...SAVING, resume_from_checkpoint: join(place.out, "checkpoint-4") }));
		expect(ofType(rest, "step")[0]?.step).toBe(5);
		expect(weights(other.out)).toBe(weights(place.out));
	});

	it("of a run that is done does nothing more", async () => {
		const place = workspace(folder);
		await events(trainer(place, SAVING));
		const before = weights(place.out);
		const rest = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(ofType(rest, "step")).toEqual([]);
		expect(rest.at(-1)).toMatchObject({ outcome: "completed", steps: 8, modelPath: place.out });
		expect(weights(place.out)).toBe(before);
	});

	it("starts from the beginning where there is no checkpoint yet", async () => {
		const place = workspace(folder);
		await dieAt(place, 2, SAVING);
		const all = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(ofType(all, "notice")[0]?.message).toContain("there is no checkpoint");
		expect(metricsOf(place.out).map(({ step }) => step)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
	});

	it("resumes after an interruption without losing a step", async () => {
		const place = workspace(folder);
		const whole = { ...place, out: `${place.out}-whole` };
		const all = await events(trainer(whole));
		const controller = new AbortController();
		const native = fakeNative({
			onStep: (step) => {
				if (step === 5) controller.abort();
				return undefined;
			},
		});
		await errorOf(trainer(place, {}, native).train({ signal: controller.signal }));
		const rest = await events(trainer(place, { resume_from_checkpoint: "latest" }));
		expect(numbers(rest)).toEqual(numbers(all).slice(5));
		expect(weights(place.out)).toBe(weights(whole.out));
	});
});

describe("resuming what is another run", () => {
	it.each([
		["per_device_train_batch_size", { per_device_train_batch_size: 3 }, "per_device_train_batch_size: 2 -> 3"],
		["gradient_accumulation_steps", { gradient_accumulation_steps: 2 }, "gradient_accumulation_steps: 3 -> 2"],
		["learning_rate", { learning_rate: 0.5 }, "learning_rate: 0.00002 -> 0.5"],
		["seed", { seed: 7 }, "seed: 42 -> 7"],
		["length of a schedule that ends", { num_train_epochs: 3 }, "steps of the whole run: 8 -> 12"],
		["text", { max_length: 100, truncation: "right" as const }, "template, tokenizer and text options"],
	] as [string, Options, string][])("is refused with what differs: %s", async (_, options, message) => {
		const place = workspace(folder);
		await dieAt(place, 4, SAVING);
		const before = checkpoints(place.out);
		const error = await errorOf(trainer(place, { ...SAVING, ...options, resume_from_checkpoint: "latest" }).train());
		expect(error).toMatchObject({ code: "ARL_STATE", exitCode: 3 });
		expect(error.message).toContain(message);
		expect(checkpoints(place.out)).toEqual(before);
	});

	it("is refused for other rows and another model", async () => {
		const place = workspace(folder);
		await dieAt(place, 4, SAVING);
		const resume: Options = { ...SAVING, resume_from_checkpoint: "latest" };
		writeFileSync(join(place.model, "model.safetensors"), "other");
		expect((await errorOf(trainer(place, resume).train())).message).toContain("weights of the model");
		writeFileSync(join(place.model, "model.safetensors"), "fake");
		appendFileSync(place.file, `${chatRow("one more")}\n`);
		const rows = await errorOf(trainer(place, resume).train());
		expect(rows.message).toContain("rows (content of the data set)");
		expect(rows.message).toContain("number of rows: 22 -> 23");
	});

	it("lets a run whose schedule has no end become longer", async () => {
		const place = workspace(folder);
		const constant: Options = { ...SAVING, lr_scheduler_type: "constant" };
		await trainer(place, { ...constant, num_train_epochs: 1 }).train();
		const rest = await events(trainer(place, { ...constant, resume_from_checkpoint: "latest" }));
		expect(ofType(rest, "step").map(({ step }) => step)).toEqual([5, 6, 7, 8]);
	});
});

describe("checkpoints", () => {
	it("are complete, and save_total_limit keeps the newest", async () => {
		const place = workspace(folder);
		const all = await events(trainer(place, { ...SAVING, save_total_limit: 2 }));
		expect(checkpoints(place.out)).toEqual(["checkpoint-6", "checkpoint-8"]);
		const order = all.filter(({ type }) => type === "saved" || type === "removed").map(({ type }) => type);
		expect(order).toEqual(["saved", "saved", "saved", "removed", "saved", "removed"]);
		expect(ofType(all, "saved").at(-1)?.reason).toBe("end");
	});

	it("come with each epoch when asked", async () => {
		const place = workspace(folder);
		await events(trainer(place, { save_strategy: "epoch" }));
		expect(checkpoints(place.out)).toEqual(["checkpoint-4", "checkpoint-8"]);
	});

	it("that could not be saved leave the last good one, and no part of themselves", async () => {
		const place = workspace(folder);
		const noSpace = () => {
			throw Object.assign(new Error("ENOSPC: no space left on device, write"), { code: "ENOSPC", syscall: "write" });
		};
		let saves = 0;
		const native = fakeNative({
			onSaveState: () => {
				saves += 1;
				if (saves === 2) noSpace();
			},
		});
		const error = await errorOf(trainer(place, SAVING, native).train());
		expect(error).toMatchObject({ code: "ARL_IO", exitCode: 1 });
		expect(error.message).toContain(join(place.out, "checkpoint-4"));
		expect(error.message).toContain("no space left");
		expect(error.hint).toContain(join(place.out, "checkpoint-2"));
		expect(checkpoints(place.out)).toEqual(["checkpoint-2"]);
		const rest = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(rest.at(-1)).toMatchObject({ outcome: "completed" });
	});

	it("left half-written by a killed process are removed, and never taken for one", async () => {
		const place = workspace(folder);
		await dieAt(place, 5, SAVING);
		const half = join(place.out, ".checkpoint-6.partial");
		mkdirSync(half);
		writeFileSync(join(half, "model.safetensors"), "half");
		const all = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(ofType(all, "removed")[0]).toEqual({ type: "removed", path: half, reason: "unfinished" });
		expect(existsSync(half)).toBe(false);
	});

	it("about to be replaced when the process was killed are put back", async () => {
		const place = workspace(folder);
		await dieAt(place, 5, SAVING);
		cpSync(join(place.out, "checkpoint-4"), join(place.out, ".checkpoint-6.old"), { recursive: true });
		const { removeUnfinished } = await import("../src/run/checkpoint/checkpoint.js");
		expect(await removeUnfinished(place.out)).toEqual([]);
		expect(checkpoints(place.out)).toEqual(["checkpoint-2", "checkpoint-4", "checkpoint-6"]);
	});

	it("that are damaged are skipped by latest, and refused by name", async () => {
		const place = workspace(folder);
		await dieAt(place, 5, SAVING);
		const damaged = join(place.out, "checkpoint-4", "model.safetensors");
		writeFileSync(damaged, readFileSync(damaged, "utf8").replace("0", "1"));
		const byName = await errorOf(
			trainer(place, { ...SAVING, resume_from_checkpoint: join(place.out, "checkpoint-4") }).train(),
		);
		expect(byName).toMatchObject({ code: "ARL_STATE", exitCode: 3 });
		expect(byName.message).toContain(`${damaged}: its content is not what was written`);
		writeFileSync(damaged, "short");
		const all = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(ofType(all, "resumed")[0]?.step).toBe(2);
		expect(ofType(all, "notice")[0]?.message).toContain("5 bytes");
	});

	it("that are none are refused: a missing folder, a plain model", async () => {
		const place = workspace(folder);
		const missing = await errorOf(trainer(place, { resume_from_checkpoint: join(folder, "gone") }).train());
		expect(missing).toMatchObject({ code: "ARL_STATE" });
		expect(missing.message).toContain("does not exist");
		const plain = await errorOf(trainer(place, { resume_from_checkpoint: place.model }).train());
		expect(plain.message).toContain("no checkpoint of this program");
		expect(plain.hint).toContain("model_name_or_path");
		expect(existsSync(place.out)).toBe(false);
	});
});
