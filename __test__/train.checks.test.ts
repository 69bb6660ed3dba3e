/** What a run checks before its first step. */
import { existsSync, mkdirSync, readdirSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { EngineOptions } from "../src/native.js";
import { fakeNative, writeFakeModel } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { metricsOf } from "./support/real.js";
import { events, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();

describe("checks before training", () => {
	it("refuse a model's folder that is none", async () => {
		const place = workspace(folder);
		const missing = await errorOf(trainer({ ...place, model: `${place.model}x` }).train());
		expect(missing).toMatchObject({ code: "ARL_CONFIG", exitCode: 2 });
		expect(missing.message).toContain("does not exist");
		const file = await errorOf(trainer({ ...place, model: place.file }).train());
		expect(file.message).toContain("is not a folder");
		const empty = join(folder, "empty-model");
		mkdirSync(empty);
		expect((await errorOf(trainer({ ...place, model: empty }).train())).message).toContain("config.json: no such file");
		writeFileSync(join(empty, "config.json"), "{");
		expect((await errorOf(trainer({ ...place, model: empty }).train())).message).toContain("config.json: not JSON");
	});

	it("refuse a tokenizer that is larger than the model's vocabulary, and a stop token outside it", async () => {
		const place = workspace(folder);
		writeFakeModel(place.model, { vocab_size: 200 });
		const larger = await errorOf(trainer(place).train());
		expect(larger).toMatchObject({ code: "ARL_TEXT", exitCode: 3 });
		expect(larger.message).toContain("ids up to 255, and the model's vocab_size is 200");
		const stop = await errorOf(trainer(place, {}, fakeNative({ tokenizerVocab: 200, stopIds: [250] })).train());
		expect(stop.message).toContain("id 250");
	});

	it("warn where no row trains the token that ends a reply", async () => {
		const place = workspace(folder);
		const all = await events(trainer(place, {}, fakeNative({ stopIds: [7] })));
		expect(
			ofType(all, "notice")
				.map(({ message }) => message)
				.join(),
		).toContain("will not learn to stop");
	});

	it("refuse an output folder that holds another run, that is a file, and that is the model", async () => {
		const place = workspace(folder);
		await trainer(place).train();
		const another = await errorOf(trainer(place).train());
		expect(another).toMatchObject({ code: "ARL_CONFIG", exitCode: 2 });
		expect(another.message).toContain(`${place.out} holds another run`);
		expect(another.hint).toContain("--resume_from_checkpoint latest");
		const file = await errorOf(trainer({ ...place, out: place.file }).train());
		expect(file.message).toContain("is a file");
		const below = await errorOf(trainer({ ...place, out: join(place.file, "out") }).train());
		expect(below.message).toContain("is a file");
		const link = join(folder, "link-to-model");
		symlinkSync(place.model, link);
		const same = await errorOf(trainer({ ...place, out: link }).train());
		expect(same.message).toContain("same folder");
	});

	it("refuse a folder that another run is in, and take over what a killed one left", async () => {
		const place = workspace(folder);
		for await (const event of trainer(place).run()) {
			if (event.type !== "step" || event.step !== 2) continue;
			const error = await errorOf(trainer(place, { resume_from_checkpoint: "latest" }).train());
			expect(error).toMatchObject({ code: "ARL_STATE" });
			expect(error.message).toContain(`process ${process.pid}`);
		}
		expect(existsSync(join(place.out, ".arl-lock"))).toBe(false);
		// This process's number, another start: a process of the past.
		writeFileSync(join(place.out, ".arl-lock"), `${process.pid} 1`);
		await trainer(place, { resume_from_checkpoint: "latest" }).train();
	});

	it("let another run take the folder's place when asked, and touch no other file there", async () => {
		const place = workspace(folder);
		await trainer(place, { save_strategy: "steps", save_steps: 3 }).train();
		writeFileSync(join(place.out, "notes.txt"), "mine");
		expect(existsSync(join(place.out, "checkpoint-6"))).toBe(true);
		await trainer(place, { overwrite_output_dir: true, num_train_epochs: 1 }).train();
		expect(readdirSync(place.out).filter((name) => !name.startsWith("."))).toEqual([
			"config.json",
			"metrics.jsonl",
			"model.safetensors",
			"notes.txt",
			"report.html",
			"run.json",
		]);
		expect(metricsOf(place.out)).toHaveLength(4);
	});

	it("refuse a run that memory does not hold, and say what to change", async () => {
		const place = workspace(folder);
		const error = await errorOf(trainer(place, {}, fakeNative({ availableBytes: 1000 })).train());
		expect(error).toMatchObject({ code: "ARL_OOM", exitCode: 4 });
		expect(error.message).toMatch(/the run needs .* of memory, and fake has 1000 B available\nweights .*, activations/);
		expect(error.hint).toMatch(/--per_device_train_batch_size 1 saves .*: it then needs .*\./);
		expect(existsSync(place.out)).toBe(false);
	});

	it("refuse a run whose checkpoints the disk does not hold", async () => {
		const place = workspace(folder);
		const native = fakeNative();
		const open = native.Engine.open;
		native.Engine.open = async (options) => {
			const engine = await open(options);
			const info = engine.info();
			engine.info = () => ({ ...info, parameters: 1e15, trainedParameters: 1e15 });
			return engine;
		};
		const error = await errorOf(trainer(place, {}, native).train());
		expect(error).toMatchObject({ code: "ARL_IO", exitCode: 1 });
		expect(error.message).toContain(place.out);
		expect(existsSync(place.out)).toBe(false);
	});

	it("refuse options that are wrong, with their names", async () => {
		const place = workspace(folder);
		const cases = [
			[{ learning_rate: Number.POSITIVE_INFINITY }, "learning_rate"],
			[{ learning_rate: -1 }, "learning_rate"],
			[{ lr_scheduler_kwargs: { nope: 1 } }, "lr_scheduler_kwargs.nope"],
			[{ train_weights: [1, 2] }, "train_weights"],
			[{ max_tokens_per_micro_batch: 10, max_length: 20 }, "max_length"],
			[{ resume_from_checkpoint: "latest", overwrite_output_dir: true }, "overwrite_output_dir"],
		] as const;
		for (const [options, name] of cases) {
			const error = await errorOf(async () => trainer(place, options as never).train());
			expect(error, name).toMatchObject({ code: "ARL_CONFIG", exitCode: 2 });
			expect(error.message).toContain(name);
			expect(existsSync(place.out)).toBe(false);
		}
	});
});

describe("the arithmetic of a resumed run", () => {
	const saving: Options = { bf16: true, logits_16bit: true, save_strategy: "steps", save_steps: 2, max_steps: 4 };

	it("keeps the type of its logits, passes on what the engine says of its bits, and may stop measuring products", async () => {
		const place = workspace(folder);
		const opened: EngineOptions[] = [];
		const onOpen = (options: EngineOptions) => opened.push(options);
		const dying = fakeNative({
			onOpen,
			onStep: (step) => {
				if (step === 4) throw new Error("killed");
				return undefined;
			},
		});
		await errorOf(trainer(place, saving, dying).train());
		expect(opened[0]).toMatchObject({ logits16bit: true, matmulAutotune: true });
		const f32 = { ...saving, logits_16bit: false, resume_from_checkpoint: "latest" };
		expect((await errorOf(trainer(place, f32).train())).message).toContain("logits_16bit: true -> none");
		const native = fakeNative({ onOpen, restoreNotice: "the checkpoint is of another GPU" });
		const rest = await events(
			trainer(place, { ...saving, matmul_autotune: false, resume_from_checkpoint: "latest" }, native),
		);
		expect(opened.at(-1)).toMatchObject({ logits16bit: true, matmulAutotune: false });
		expect(ofType(rest, "notice").map(({ message }) => message)).toContain("the checkpoint is of another GPU");
		expect(ofType(rest, "resumed")[0]?.changed).toContain("matmul_autotune: none -> false");
	});
});
