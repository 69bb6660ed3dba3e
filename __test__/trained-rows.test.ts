/** The rows that a run predicted worst when it trained them: against an evaluation of the same weights, and what is kept of them. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { evaluate } from "../src/api/evaluate.js";
import { QwenTrainer } from "../src/api/trainer.js";
import type { HighLoss, TrainedRowsEvent } from "../src/events.js";
import type { MicroBatch } from "../src/native.js";
import { RunReader } from "../src/report/runs/read-run.js";
import { TrainedRows } from "../src/run/loop/trained-rows.js";
import { temporaryFolder } from "./support/folder.js";
import { linesOf, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

/** Two sequences of two tokens, whose targets have these weights. */
function batch(weights: number[]): MicroBatch {
	const targets = Int32Array.from(weights, (weight) => (weight < 0 ? -100 : 5));
	const given = Float32Array.from(weights, (weight) => Math.max(0, weight));
	return { cuSeqlens: Int32Array.of(0, 2, 4), targets, weights: given } as MicroBatch;
}

describe("trained rows of the highest loss", () => {
	const place = { epoch: 0, first: 0, end: 1, batchesInEpoch: 2, lastOfEpoch: false };
	const reported = (rows: TrainedRows, step: number) => [...rows.report({ step, epoch: step } as never)];

	it("are divided by the weights of their targets, leave out rows without any, and begin again with an epoch", () => {
		const rows = new TrainedRows({ location: (row) => `e:${row}` });
		expect(reported(rows, 0)).toEqual([]);
		const first = { place, rows: [Uint32Array.of(3, 4)], batches: [batch([0.5, 0.5, -1, 0])] };
		rows.add(1, first, { sequenceLosses: [[2, 0]] });
		const second = { place, rows: [Uint32Array.of(7, 8)], batches: [batch([1, 1, -1, 2])] };
		rows.add(2, second, { sequenceLosses: [[6, 8]] });
		expect(reported(rows, 2)).toEqual([
			{
				type: "trained_rows",
				step: 2,
				epoch: 2,
				firstStep: 1,
				highestLosses: [
					{ location: "e:8", loss: 4, targets: 1 },
					{ location: "e:7", loss: 3, targets: 2 },
					{ location: "e:3", loss: 2, targets: 2 },
				],
			},
		]);
		expect(reported(rows, 2)).toEqual([]);
		rows.endEpoch();
		rows.add(3, first, { sequenceLosses: [[1, 0]] });
		const [again] = reported(rows, 3);
		expect(again?.firstStep).toBe(3);
		expect(again?.highestLosses).toEqual([{ location: "e:3", loss: 1, targets: 2 }]);
	});

	it.each([
		{ name: "in batches of several rows", options: { per_device_train_batch_size: 3, gradient_accumulation_steps: 2 } },
		{ name: "packed", options: { max_tokens_per_micro_batch: 512, gradient_accumulation_steps: 2 } },
	])("have the losses that an evaluation of the same weights finds: $name", async ({ options }) => {
		const { model, file, out } = tinyPlace(folder, 20);
		const config = join(model, "config.json");
		// A saved model in a narrower type would not be quite the trained one.
		writeFileSync(config, JSON.stringify({ ...JSON.parse(readFileSync(config, "utf8")), dtype: "float32" }));
		const base = { model_name_or_path: model, init_from_config: true, bf16: false };
		const events: TrainedRowsEvent[] = [];
		// A learning rate of 0 leaves the weights as they are.
		const args = { ...base, ...options, train_file: file, output_dir: out, learning_rate: 0, num_train_epochs: 2 };
		for await (const event of new QwenTrainer({ args: { ...args, save_strategy: "no" } }).run()) {
			if (event.type === "trained_rows") events.push(event);
		}
		expect(events.map(({ epoch }) => epoch)).toEqual([1, 2]);
		expect(events[1]?.firstStep).toBe((events[0]?.step ?? Number.NaN) + 1);
		const { highestLosses } = await evaluate({ model_name_or_path: out, bf16: false, eval_file: file });
		const byPlace = (rows: HighLoss[] = []) => rows.map(({ location, targets }) => ({ location, targets }));
		expect(new Set(highestLosses.map(({ loss }) => loss)).size).toBeGreaterThan(5);
		for (const { highestLosses: trained } of events) {
			expect(byPlace(trained)).toEqual(byPlace(highestLosses));
			for (const [i, { loss }] of trained.entries()) expect(loss).toBeCloseTo(highestLosses[i]?.loss ?? Number.NaN, 5);
		}

		const lines = linesOf(out).filter(({ event }) => event === "trained_rows");
		expect(lines.map(({ step }) => step)).toEqual(events.map(({ step }) => step));
		const reader = new RunReader(out);
		reader.update();
		const last = events[1];
		expect(reader.trainedRows).toEqual({
			step: last?.step,
			firstStep: last?.firstStep,
			rows: last?.highestLosses.map((row) => ({ ...row, source: null })),
		});
		expect(reader.highestLosses).toBeNull();
	});
});
