import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { Dataset } from "../src/data/custom.js";
import type { RecordData } from "../src/data/record.js";
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
