import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { createTrainer, type QwenTrainer } from "../src/api/trainer.js";
import { parseFlags, resolveConfig } from "../src/config/index.js";
import { createOrder } from "../src/data/sampler/order.js";
import type { RecordData } from "../src/data/sources/record.js";
import { argsOf, counted, dyingAt, type Place, stream } from "./support/code.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { chatRow, events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const row = (text: string): RecordData => JSON.parse(chatRow(text));
const weights = (path: string) => readFileSync(join(path, "model.safetensors"), "utf8");

describe("caps", () => {
	const order = (seed: number, caps: (number | null)[], extra = {}) =>
		createOrder({ rows: 30, seed, strategy: "sequential", caps: { rows: [20, 10], caps }, ...extra });

	it("use at most so many rows of an entry, the same in every epoch, in their order", () => {
		const { all, epoch, rowsPerEpoch } = order(1, [5, null]);
		expect(rowsPerEpoch).toBe(15);
		expect([...epoch(0)]).toEqual([...all]);
		expect([...epoch(3)]).toEqual([...all]);
		expect([...all].filter((value) => value < 20)).toHaveLength(5);
		expect([...all]).toEqual([...all].sort((a, b) => a - b));
		expect([...all].slice(5)).toEqual(Array.from({ length: 10 }, (_, i) => 20 + i));
		expect([...order(1, [100, 10]).all]).toHaveLength(30);
	});

	it("draw with the seed: each row as likely as another", () => {
		expect([...order(1, [5, 5]).all]).toEqual([...order(1, [5, 5]).all]);
		const drawn = new Array(20).fill(0);
		for (let seed = 0; seed < 400; seed++)
			for (const value of order(seed, [5, 1]).all) if (value < 20) drawn[value] += 1;
		// 100 expected each; the chance that one of 20 is off by 40 is below 1e-4.
		expect(Math.min(...drawn)).toBeGreaterThan(60);
		expect(Math.max(...drawn)).toBeLessThan(140);
	});

	it("are given as numbers and none, in flags as in code", () => {
		const given = (words: string) => {
			const { options } = parseFlags(`--model_name_or_path m --output_dir o --train_file a b ${words}`.split(" "));
			return resolveConfig([{ origin: "flag", values: options }]).args.train_caps;
		};
		expect(given("--train_caps 10 none")).toEqual([10, null]);
		expect(given("--train_caps none 5")).toEqual([null, 5]);
		expect(given("--train_caps none")).toEqual([]);
		for (const words of ["0 1", "1.5 2", "many 1", "1 2 3 4"]) {
			expect(() => given(`--train_caps ${words}`), words).toThrow(/train_caps/);
		}
	});

	it("count usable rows, and hold in a mixture", () => {
		const usable = (value: number) => value % 2 === 0;
		expect([...order(1, [9, 4], { usable }).all].every(usable)).toBe(true);
		expect(order(1, [9, 4], { usable }).rowsPerEpoch).toBe(13);
		const mixture = { rows: [20, 10], weights: [1, 3] };
		const mixed = order(1, [4, 4], { mixture });
		expect(mixed.rowsPerEpoch).toBe(8);
		expect([...mixed.epoch(0)].filter((value) => value >= 20)).toHaveLength(6);
		expect(new Set([...mixed.epoch(0), ...mixed.epoch(1), ...mixed.epoch(5)]).size).toBe(8);
	});
});

/** A workspace whose file has 22 rows, 14 rows more, and both as two files. */
function twoEntries(): { place: Place; more: RecordData[]; second: string } {
	const place = workspace(folder);
	const more = Array.from({ length: 14 }, (_, i) => row(`code ${i}`));
	const second = join(place.model, "..", "second.jsonl");
	writeFileSync(second, more.map((value) => `${JSON.stringify(value)}\n`).join(""));
	return { place, more, second };
}

const MIXES: [string, Options][] = [
	["one after the other", {}],
	["by weight", { train_weights: [1, 3] }],
	["with caps", { train_caps: [10, 4] }],
	["by weight, with caps, seeded", { train_weights: [2, 1], train_caps: [null, 5], data_seed: 7 }],
	["in order", { train_sampling_strategy: "sequential" }],
	["packed", { max_tokens_per_micro_batch: 60, gradient_accumulation_steps: 2, train_weights: [1, 1] }],
];

describe("files and a data set together", () => {
	const run = (place: Place, rows: ConstructorParameters<typeof QwenTrainer>[0]["train_dataset"], options: Options) => {
		const args = argsOf(place, { train_file: place.file, ...options });
		return (native = fakeNative()) => createTrainer({ args, train_dataset: rows as RecordData[] }, () => native);
	};

	it.each(MIXES)("%s: train as two files do, in bits, and go on so", async (_, options) => {
		const { place, more, second } = twoEntries();
		const files = { ...place, out: `${place.out}-files` };
		const expected = await events(trainer(files, { ...options, train_file: [place.file, second] }));
		for (const [i, make] of [() => counted(more), () => stream(more), () => more].entries()) {
			const to = { ...place, out: `${place.out}-${i}` };
			const saving: Options = { ...options, save_strategy: "steps", save_steps: 2 };
			await run(
				to,
				make(),
				saving,
			)(dyingAt(4))
				.train()
				.catch(() => {});
			const rest = await events(run(to, make(), { ...saving, resume_from_checkpoint: "latest" })());
			expect(ofType(rest, "resumed")[0]?.step).toBe(2);
			expect(numbers(rest)).toEqual(numbers(expected).filter(({ step }) => step > 2));
			expect(weights(to.out)).toBe(weights(files.out));
		}
	});

	it("a cap asks a data set for the rows that are used alone", async () => {
		const { place, more } = twoEntries();
		const data = counted(more);
		await run(place, data, { train_caps: [3, 4] })().train();
		expect(new Set(data.asked).size).toBe(4);
		expect(data.asked).toHaveLength(4);
	});

	it("a change of caps is another run", async () => {
		const { place, more } = twoEntries();
		const saving: Options = { train_caps: [12, 8], save_strategy: "steps", save_steps: 2 };
		await run(
			place,
			more,
			saving,
		)(dyingAt(4))
			.train()
			.catch(() => {});
		const other = { ...saving, train_caps: [8, 12], resume_from_checkpoint: "latest" };
		expect((await errorOf(run(place, more, other)().train())).message).toContain("train_caps: [12,8] -> [8,12]");
	});

	it("a weight or cap for each entry is needed, the data set's included", async () => {
		const { place, more } = twoEntries();
		const few = await errorOf(run(place, more, { train_weights: [1] })().train());
		expect(few.message).toBe("train_weights: 1 weights for 2 entries");
		expect(few.hint).toContain("one more for a data set from code");
		const caps = await errorOf(run(place, more, { train_caps: [1] })().train());
		expect(caps.message).toBe("train_caps: 1 values for 2 entries");
		expect(() => run(place, more, { train_caps: [1, 2, 3] })()).toThrow(/train_caps has 3 values/);
	});
});
