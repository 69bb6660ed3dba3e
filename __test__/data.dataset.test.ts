import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { type Dataset, openDataset } from "../src/data/sources/custom.js";
import type { RecordData } from "../src/data/sources/record.js";
import { Scratch } from "../src/data/sources/scratch.js";
import type { TrainEvent } from "../src/events.js";
import { counted, dyingAt, onDataset, type Place, rowsOf, stream } from "./support/code.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { chatRow, events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const SAVING: Options = { save_strategy: "steps", save_steps: 2 };
const weights = (path: string) => readFileSync(join(path, "model.safetensors"), "utf8");
const row = (text: string): RecordData => JSON.parse(chatRow(text));
const many = (count: number) => Array.from({ length: count }, (_, i) => row(`answer ${i}`));

/** A stream that says how many rows it has. */
const withLength = (rows: readonly RecordData[]) => Object.assign(stream(rows), { length: rows.length });

const SEQUENTIAL: Options = { train_sampling_strategy: "sequential" };
const STEPS: Options = { ...SEQUENTIAL, max_steps: 7 };
const KINDS: [string, (rows: RecordData[]) => Dataset, Options][] = [
	["a list", (rows) => rows, {}],
	["by index", (rows) => counted(rows), {}],
	["by index, async", (rows) => ({ length: rows.length, get: async (i) => rows[i] as RecordData }), {}],
	["by index, with an identity", (rows) => counted(rows, "rows 1"), {}],
	["by index, packed", (rows) => counted(rows), { max_tokens_per_micro_batch: 40, gradient_accumulation_steps: 2 }],
	["a set", (rows) => new Set(rows), {}],
	["a stream that is shuffled", stream, {}],
	["a stream with a length, in order", withLength, SEQUENTIAL],
	["by index, all rows known first", (rows) => counted(rows), { on_bad_row: "skip" }],
	["a stream of unknown length, in order, over more than an epoch", stream, STEPS],
];

/** Runs the same rows from the file and from code. */
async function both(place: Place, make: (rows: RecordData[]) => Dataset, options: Options) {
	const fromFile = { ...place, out: `${place.out}-file` };
	const expected = await events(trainer(fromFile, options));
	const found = await events(onDataset(place, make(rowsOf(place)), options));
	return { fromFile, expected, found };
}

describe("rows from code", () => {
	it.each(KINDS)("%s: train as the same rows of a file do, in bits", async (_, make, options) => {
		const place = workspace(folder);
		const { fromFile, expected, found } = await both(place, make, { ...SAVING, ...options });
		// Nobody knows the epochs of an open stream before its end.
		const plain = (all: typeof found) => numbers(all).map(({ epoch: _, ...rest }) => rest);
		expect(plain(found)).toEqual(plain(expected));
		expect(weights(place.out)).toBe(weights(fromFile.out));
		expect(ofType(found, "epoch").map(({ step }) => step)).toEqual(ofType(expected, "epoch").map(({ step }) => step));
	});

	it.each(KINDS)("%s: a resumed run has the numbers of the run never stopped", async (_, make, options) => {
		const place = workspace(folder);
		const whole = { ...place, out: `${place.out}-whole` };
		const all = { ...SAVING, ...options };
		const expected = await events(onDataset(whole, make(rowsOf(place)), all));
		for (const step of [4, 6]) {
			const resume = step === 4 ? {} : { resume_from_checkpoint: "latest" };
			await errorOf(onDataset(place, make(rowsOf(place)), { ...all, ...resume }, dyingAt(step)).train()).catch(
				() => {},
			);
		}
		const rest = await events(onDataset(place, make(rowsOf(place)), { ...all, resume_from_checkpoint: "latest" }));
		expect(ofType(rest, "resumed")[0]?.step).toBe(4);
		expect(numbers(rest)).toEqual(numbers(expected).filter(({ step }) => step > 4));
		expect(weights(place.out)).toBe(weights(whole.out));
	});
});

describe("a data set with get(i)", () => {
	it("is asked for the rows that the run needs alone, each once, in the order of training", async () => {
		const place = workspace(folder);
		const data = counted(many(1000));
		const order: number[] = [];
		const native = fakeNative({
			onStep: (_, batches) => {
				for (const { inputIds, cuSeqlens } of batches) {
					for (let i = 0; i + 1 < cuSeqlens.length; i++) {
						const text = Buffer.from(inputIds.subarray(cuSeqlens[i], cuSeqlens[i + 1])).toString("latin1");
						order.push(Number(/answer (\d+)/.exec(text)?.[1]));
					}
				}
				return undefined;
			},
		});
		await onDataset(place, data, { max_steps: 3 }, native).train();
		expect(data.asked).toEqual(order);
		expect(data.asked).toHaveLength(18);
	});

	it("is asked again for the rows that are still to be trained alone; with an identity, for those without tokens", async () => {
		for (const [identity, most] of [
			[undefined, 88],
			["v1", 32],
		] as const) {
			const place = workspace(folder);
			const options: Options = { ...SAVING, num_train_epochs: 1 };
			const disk = new Map();
			await onDataset(place, counted(many(100), identity), options, dyingAt(4, disk))
				.train()
				.catch(() => {});
			const data = counted(many(100), identity);
			await onDataset(place, data, { ...options, resume_from_checkpoint: "latest" }, fakeNative({}, disk)).train();
			// Those that tell the shape are asked for in any case.
			expect(data.asked).toHaveLength(most);
			expect(new Set(data.asked).size).toBe(most);
		}
	});

	it("makes rows only some way ahead of training", async () => {
		const place = workspace(folder);
		const data = counted(many(20_000));
		let most = 0;
		const native = fakeNative({
			onStep: (step) => {
				most = Math.max(most, data.asked.length - step * 6);
				return undefined;
			},
		});
		await onDataset(place, data, { max_steps: 30 }, native).train();
		const long = counted(many(20_000));
		const run = onDataset({ ...place, out: `${place.out}-long` }, long, { num_train_epochs: 1 }).run();
		for await (const event of run) if (event.type === "step" && event.step === 3) break;
		expect(long.asked.length).toBeLessThan(2048 + 256 + 100);
		expect(most).toBeGreaterThan(0);
	});

	it.each([
		["fractional", 2.5],
		["negative", -1],
		["infinite", Number.POSITIVE_INFINITY],
		["not a number", Number.NaN],
	])("with a length that is %s is refused", async (_, length) => {
		const place = workspace(folder);
		const error = await errorOf(onDataset(place, { length, get: () => row("a") }).train());
		expect(error.code).toBe("ARL_CONFIG");
		expect(error.message).toContain(`its length is ${length}`);
	});

	it("with fewer rows than its length says so, row by row", async () => {
		const place = workspace(folder);
		const rows = many(10);
		const data = { length: 12, get: (i: number) => rows[i] as RecordData };
		const error = await errorOf(onDataset(place, data).train());
		expect(error.code).toBe("ARL_DATA");
		expect(error.message).toMatch(/^2 of 12 rows cannot be used \(2 not a row\)/);
		expect(error.message).toContain("train_dataset[10]: not a row: get(10) returned undefined");
		const all = await events(onDataset(place, data, { on_bad_row: "skip" }));
		expect(ofType(all, "rows_skipped")[0]?.reasons).toEqual({ "not a row": 2 });
		expect(ofType(all, "start")[0]?.data.rowsPerEpoch).toBe(10);
	});

	it("whose length changes is noticed", async () => {
		const place = workspace(folder);
		const rows = many(40);
		const error = await errorOf(
			onDataset(place, {
				get length() {
					return rows.length;
				},
				get: (i) => {
					if (i === 5) rows.push(row("one more"));
					return rows[i] as RecordData;
				},
			}).train(),
		);
		expect(error.message).toContain("its length was 40 and is 41 now");
	});

	it("that throws or rejects is reported with the row, and follows on_bad_row", async () => {
		const place = workspace(folder);
		const rows = many(22);
		const data = {
			length: 22,
			get: async (i: number) => {
				if (i === 7) throw new Error("connection lost");
				return rows[i] as RecordData;
			},
		};
		const error = await errorOf(onDataset(place, data).train());
		expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		expect(error.message).toBe("train_dataset[7]: conversion failed: get(7) threw: connection lost");
		const all = await events(onDataset(place, data, { on_bad_row: "skip" }));
		expect(ofType(all, "rows_skipped")[0]?.rows).toEqual([
			{ location: "train_dataset[7]", reason: "conversion failed", message: "get(7) threw: connection lost" },
		]);
	});
});

describe("a stream", () => {
	it("in order is trained while it comes, and read no further than the run needs", async () => {
		const place = workspace(folder);
		const counts = { taken: 0 };
		async function* endless() {
			for (;;) yield row(`answer ${counts.taken++}`);
		}
		const result = await onDataset(place, endless(), { ...SEQUENTIAL, max_steps: 5 }).train();
		expect(result.steps).toBe(5);
		expect(counts.taken).toBe(30);
	});

	it("that hangs is left when the run is stopped, with a checkpoint", async () => {
		const place = workspace(folder);
		async function* hanging() {
			yield* many(13);
			await new Promise(() => {});
		}
		const options: Options = { ...SEQUENTIAL, max_steps: 5, preprocess_seconds: 0 };
		const controller = new AbortController();
		const all: TrainEvent[] = [];
		for await (const event of onDataset(place, hanging(), options).run({ signal: controller.signal })) {
			all.push(event);
			if (event.type === "step" && event.step === 2) setTimeout(() => controller.abort(), 50);
		}
		expect(all.at(-1)).toMatchObject({ outcome: "interrupted", steps: 2 });
		expect(existsSync(join(place.out, "checkpoint-2"))).toBe(true);
	});

	it.each([
		["shuffled, after a row", 1, {}],
		["in order, before the first row", 0, { ...STEPS }],
	] as [string, number, Options][])("that hangs (%s) is left when the run is stopped", async (_, count, options) => {
		const place = workspace(folder);
		async function* hanging() {
			yield* many(count);
			await new Promise(() => {});
		}
		const controller = new AbortController();
		setTimeout(() => controller.abort(), 100);
		const error = await errorOf(onDataset(place, hanging(), options).train({ signal: controller.signal }));
		expect(error.code).toBe("ARL_INTERRUPTED");
	});

	it("without an end that is to be shuffled is refused before the disk is full, with what to do", async () => {
		const place = workspace(folder);
		function* endless() {
			for (;;) yield row("x".repeat(1000));
		}
		const scratch = new Scratch(fakeNative(), place.model);
		const reading = {
			streamed: null,
			ahead: 1,
			about: () => ({ identity: "", ledger: null }),
			signal: null,
			most: Number.POSITIVE_INFINITY,
			progress: () => {},
			scratch,
			maxSpillBytes: 100_000,
		};
		const error = await errorOf(openDataset(endless(), reading));
		expect(error.code).toBe("ARL_DATA");
		expect(error.message).toMatch(/train_dataset: no end after 9\d rows \(98 KiB\)/);
		expect(error.hint).toContain("max_steps and train_sampling_strategy sequential");
		expect(readdirSync(scratch.path())).toEqual(["lock"]);
		scratch.close();
		expect(readdirSync(place.model).filter((name) => name.includes("scratch"))).toEqual([]);
	});

	it("that throws ends the run with the row, also where bad rows are left out", async () => {
		const place = workspace(folder);
		async function* failing() {
			yield* many(4);
			throw new Error("connection lost");
		}
		for (const options of [{}, { on_bad_row: "skip" }, { ...SEQUENTIAL, max_steps: 1 }] as Options[]) {
			const error = await errorOf(onDataset(place, failing(), options).train());
			expect(error.code).toBe("ARL_DATA");
			expect(error.message).toBe("train_dataset[4]: the data set threw: connection lost");
		}
	});

	it("that ends before its length is refused", async () => {
		const place = workspace(folder);
		const lying = Object.assign(stream(many(10)), { length: 12 });
		const error = await errorOf(onDataset(place, lying, SEQUENTIAL).train());
		expect(error.message).toContain("its length is 12, and it ended after 10 rows");
		const infinite = Object.assign(stream(many(10)), { length: Number.POSITIVE_INFINITY });
		expect((await errorOf(onDataset(place, infinite, SEQUENTIAL).train())).hint).toContain("max_steps");
	});

	it("that is shuffled, and rows by index, tell what going on costs too", async () => {
		const kinds: [Dataset, Dataset, RegExp | null][] = [
			[stream(many(22)), stream(many(22)), /^22 rows of train_dataset were read again in [\d.]+ s$/],
			[counted(many(22)), counted(many(22)), /that are still to be trained are read again and compared/],
			[counted(many(22), "v1"), counted(many(22), "v1"), null],
		];
		for (const [first, second, expected] of kinds) {
			const place = workspace(folder);
			await onDataset(place, first, SAVING, dyingAt(4))
				.train()
				.catch(() => {});
			const all = await events(onDataset(place, second, { ...SAVING, resume_from_checkpoint: "latest" }));
			const messages = ofType(all, "notice").map(({ message }) => message);
			if (expected === null) expect(messages).toEqual([]);
			else expect(messages).toContainEqual(expect.stringMatching(expected));
		}
	});

	it("tells what coming back to the place of a checkpoint has cost", async () => {
		const place = workspace(folder);
		await onDataset(place, stream(many(40)), { ...STEPS, ...SAVING, max_steps: 6 }, dyingAt(4))
			.train()
			.catch(() => {});
		const resume = { ...STEPS, ...SAVING, max_steps: 6, resume_from_checkpoint: "latest" };
		const all = await events(onDataset(place, stream(many(40)), resume));
		expect(ofType(all, "notice").map(({ message }) => message)).toContainEqual(
			expect.stringMatching(/^\d+ rows of train_dataset were read again in [\d.]+ s to reach the place/),
		);
	});
});
