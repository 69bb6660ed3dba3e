import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { createTrainer } from "../src/api/trainer.js";
import { type Faults, fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { events, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();

/** A run whose steps take a moment, and what it does with them. */
function watched(options: Options = {}, faults: Faults = {}) {
	const place = workspace(folder);
	const heard: string[] = [];
	const native = fakeNative({
		stepMs: 20,
		onQueue: (what) => void heard.push(what),
		onSaveState: () => void heard.push("save"),
		...faults,
	});
	return { place, heard, native, run: trainer(place, { max_steps: 4, ...options }, native) };
}

describe("steps ahead", () => {
	it("are submitted while the step before is in progress, and finished one after the other", async () => {
		const { heard, run } = watched();
		expect(ofType(await events(run), "step").map(({ step }) => step)).toEqual([1, 2, 3, 4]);
		expect(heard).toEqual([
			...["submit 1", "finish 1", "submit 2", "finished 1"],
			...["finish 2", "submit 3", "finished 2"],
			...["finish 3", "submit 4", "finished 3", "finish 4", "finished 4"],
		]);
	});

	it("wait for a checkpoint that is due", async () => {
		const { heard, run } = watched({ save_strategy: "steps", save_steps: 2 });
		await run.train();
		expect(heard).toEqual([
			...["submit 1", "finish 1", "submit 2", "finished 1", "finish 2", "finished 2", "save"],
			...["submit 3", "finish 3", "submit 4", "finished 3", "finish 4", "finished 4", "save"],
		]);
	});

	it("are given up when a callback stops the run", async () => {
		const { place, heard, native, run } = watched();
		const callbacks = [
			{ onStep: ({ step }: { step: number }, control: { stop(): void }) => void (step === 2 && control.stop()) },
		];
		const result = await createTrainer({ args: run.args, callbacks }, () => native).train();
		expect(result).toMatchObject({ outcome: "stopped", steps: 2, modelPath: join(place.out, "checkpoint-2") });
		expect(heard.slice(-5)).toEqual(["finish 2", "submit 3", "finished 2", "discard", "save"]);
	});

	it("are given up behind a step that is not finite, whose own batch is kept", async () => {
		const batches: number[][] = [];
		const onStep: Faults["onStep"] = (step, [batch]) => {
			batches.push(Array.from(batch?.inputIds ?? []));
			return step === 2 ? Number.NaN : undefined;
		};
		const { place, heard, run } = watched({}, { onStep });
		const error = await errorOf(run.train());
		expect(error).toMatchObject({ code: "ARL_NONFINITE", exitCode: 5 });
		expect(heard.slice(-4)).toEqual(["finish 2", "submit 3", "finished 2", "discard"]);
		const kept = JSON.parse(readFileSync(join(place.out, "nonfinite-step-2.json"), "utf8"));
		expect(kept.step).toBe(2);
		const [first] = kept.micro_batches as { input_ids: number[] }[][];
		expect(first?.flatMap(({ input_ids }) => input_ids)).toEqual(batches[1]);
	});

	it("are given up when the reader leaves", async () => {
		const { heard, run } = watched();
		for await (const event of run.run()) if (event.type === "step") break;
		expect(heard).toEqual(["submit 1", "finish 1", "submit 2", "finished 1", "discard"]);
	});
});
