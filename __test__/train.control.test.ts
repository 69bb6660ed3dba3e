/** What callers and callbacks do to a run while it trains. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { createTrainer, type TrainerCallback } from "../src/api/trainer.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const checkpoints = (out: string) => readdirSync(out).filter((name) => name.startsWith("checkpoint"));

function withCallback(place: ReturnType<typeof workspace>, callback: TrainerCallback, options: Options = {}) {
	return createTrainer({ args: trainer(place, options).args, callbacks: [callback] }, () => fakeNative());
}

/** A callback that asks for checkpoints after these steps. */
const savingAfter = (...steps: number[]): TrainerCallback => ({
	onStep: ({ step }, control) => {
		if (steps.includes(step)) control.save();
	},
});

describe("a callback", () => {
	it("hears of what happens, and can stop the run", async () => {
		const place = workspace(folder);
		const heard: string[] = [];
		const run = withCallback(place, {
			onStart: () => void heard.push("start"),
			onStep: async ({ step }, control) => {
				heard.push(`step ${step}`);
				if (step === 2) control.stop();
			},
			onSave: ({ reason }) => void heard.push(`saved ${reason}`),
			onEnd: ({ outcome }) => void heard.push(outcome),
		});
		const result = await run.train();
		expect(heard).toEqual(["start", "step 1", "step 2", "saved interrupted", "stopped"]);
		expect(result).toMatchObject({ outcome: "stopped", steps: 2, modelPath: join(place.out, "checkpoint-2") });
	});

	it("can ask for a checkpoint, from which the run resumes to the same numbers and weights", async () => {
		const place = workspace(folder);
		const all = await events(withCallback(place, savingAfter(3, 8)));
		const heard = all.flatMap((event) =>
			event.type === "step" ? [`step ${event.step}`] : event.type === "saved" ? [`${event.reason} ${event.step}`] : [],
		);
		expect(heard.slice(1, 5)).toEqual(["step 2", "step 3", "requested 3", "step 4"]);
		expect(heard.slice(-2)).toEqual(["step 8", "requested 8"]);
		expect(numbers(all)).toEqual(numbers(await events(trainer({ ...place, out: `${place.out}-plain` }))));
		const resume_from_checkpoint = join(place.out, "checkpoint-3");
		const weights = readFileSync(join(place.out, "model.safetensors"));
		const rest = await events(trainer(place, { resume_from_checkpoint }));
		expect(numbers(rest)).toEqual(numbers(all).slice(3));
		expect(readFileSync(join(place.out, "model.safetensors"))).toEqual(weights);
	});

	it("that asks for a checkpoint where one is due, or stops the run as well, gets one", async () => {
		const reasons = async (callback: TrainerCallback, options: Options) =>
			ofType(await events(withCallback(workspace(folder), callback, options)), "saved").map(
				({ step, reason }) => `${reason} ${step}`,
			);
		const due: Options = { save_strategy: "steps", save_steps: 4 };
		expect(await reasons(savingAfter(4, 5), due)).toEqual(["steps 4", "requested 5", "end 8"]);
		const both: TrainerCallback = {
			onStep: ({ step }, control) => {
				if (step < 2) return;
				control.save();
				control.stop();
			},
		};
		expect(await reasons(both, {})).toEqual(["requested 2"]);
	});

	it("gets the checkpoint after the step to come where it asks before the first one, or behind a save", async () => {
		const place = workspace(folder);
		const callback: TrainerCallback = {
			onStart: (_, control) => control.save(),
			onSave: ({ step }, control) => void (step === 1 && control.save()),
		};
		await withCallback(place, callback, { save_total_limit: 1 }).train();
		expect(checkpoints(place.out)).toEqual(["checkpoint-2"]);
	});
});

describe("the caller", () => {
	it("can abort the run: it ends after the step in progress, saves, and train() says so", async () => {
		const place = workspace(folder);
		const controller = new AbortController();
		const native = fakeNative({
			onStep: (step) => {
				if (step === 3) controller.abort();
				return undefined;
			},
		});
		const error = await errorOf(trainer(place, {}, native).train({ signal: controller.signal }));
		expect(error).toMatchObject({ code: "ARL_INTERRUPTED", exitCode: 130 });
		expect(error.message).toContain("step 3 of 8");
		expect(existsSync(join(place.out, "checkpoint-3", "arl", "manifest.json"))).toBe(true);
	});

	it("can leave the loop of events: nothing keeps running", async () => {
		const place = workspace(folder);
		for await (const event of trainer(place).run()) if (event.type === "step") break;
		expect(checkpoints(place.out)).toEqual([]);
	});
});
