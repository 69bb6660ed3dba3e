import { readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { Dataset } from "../src/data/sources/custom.js";
import type { RecordData } from "../src/data/sources/record.js";
import { counted, dyingAt, onDataset, stream } from "./support/code.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { chatRow, events, type Options, ofType, workspace } from "./support/run.js";

const folder = temporaryFolder();
const SAVING: Options = { save_strategy: "steps", save_steps: 2 };
const row = (text: string): RecordData => JSON.parse(chatRow(text));
const many = (count: number) => Array.from({ length: count }, (_, i) => row(`answer ${i}`));

const SEQUENTIAL: Options = { train_sampling_strategy: "sequential" };
const STEPS: Options = { ...SEQUENTIAL, max_steps: 7 };

describe("a data set that has changed", () => {
	const changed = (at: number) => many(22).map((value, i) => (i === at ? row("another answer") : value));
	const cases: [string, (rows: RecordData[]) => Dataset, Options, RegExp][] = [
		["by index", (rows) => counted(rows), {}, /train_dataset\[3\]: the row is not the one/],
		["in a stream in order", stream, STEPS, /train_dataset\[3\]: the row is not the one/],
		["in a stream that is shuffled", stream, {}, /rows \(content of the data set\)/],
	];
	it.each(cases)("%s, is refused when the run goes on", async (_, make, options, message) => {
		const place = workspace(folder);
		const all = { ...SAVING, ...options };
		await onDataset(place, make(many(22)), all, dyingAt(4))
			.train()
			.catch(() => {});
		const resume = { ...all, resume_from_checkpoint: "latest" };
		const error = await errorOf(onDataset(place, make(changed(3)), resume).train());
		expect(error.code).toBe("ARL_STATE");
		expect(error.message).toMatch(message);
		const rest = await events(onDataset(place, make(many(22)), resume));
		expect(rest.at(-1)).toMatchObject({ outcome: "completed" });
	});

	it("in which rows could be had and now cannot, or the other way, is reported", async () => {
		const failing = (at: number) => ({
			length: 22,
			get: (i: number) => {
				if (i === at) throw new Error("connection lost");
				return many(22)[i] as RecordData;
			},
		});
		const resume: Options = { ...SAVING, resume_from_checkpoint: "latest" };
		const skip: Options = { ...SAVING, on_bad_row: "skip" };
		const lost = workspace(folder);
		await onDataset(lost, many(22), SAVING, dyingAt(4))
			.train()
			.catch(() => {});
		const error = await errorOf(onDataset(lost, failing(9), resume).train());
		expect(error.code).toBe("ARL_STATE");
		expect(error.message).toContain("has read this row, and now: conversion failed: get(9) threw: connection lost");
		const skipped = workspace(folder);
		await onDataset(skipped, failing(9), skip, dyingAt(4))
			.train()
			.catch(() => {});
		const back = await errorOf(onDataset(skipped, many(22), { ...skip, ...resume, on_bad_row: "skip" }).train());
		expect(back.message).toContain("train_dataset[9]: the row is not the one");
		const again = await events(onDataset(skipped, failing(9), { ...skip, ...resume, on_bad_row: "skip" }));
		expect(again.at(-1)).toMatchObject({ outcome: "completed" });
	});

	it("only in a row that ended the run is no other data set", async () => {
		const place = workspace(folder);
		const rows = many(3000);
		let broken = true;
		const data = {
			length: rows.length,
			get: (i: number) => {
				if (broken && i === 2900) throw new Error("connection lost");
				return rows[i] as RecordData;
			},
		};
		const options: Options = { ...SAVING, ...SEQUENTIAL, save_steps: 50, num_train_epochs: 1, preprocess_seconds: 0 };
		const error = await errorOf(onDataset(place, data, options).train());
		expect(error.message).toContain("train_dataset[2900]: conversion failed");
		broken = false;
		const rest = await events(onDataset(place, data, { ...options, resume_from_checkpoint: "latest" }));
		expect(ofType(rest, "resumed")[0]?.step).toBeGreaterThan(0);
		expect(rest.at(-1)).toMatchObject({ outcome: "completed", steps: 500 });
	});

	it("by its identity or length, is refused", async () => {
		const place = workspace(folder);
		await onDataset(place, counted(many(22), "v1"), SAVING, dyingAt(4))
			.train()
			.catch(() => {});
		const resume = { ...SAVING, resume_from_checkpoint: "latest" };
		const other = await errorOf(onDataset(place, counted(many(22), "v2"), resume).train());
		expect(other.code).toBe("ARL_STATE");
		expect(other.message).toContain("rows (content of the data set)");
		const longer = await errorOf(onDataset(place, counted(many(23), "v1"), resume).train());
		expect(longer.message).toContain("number of rows: 22 -> 23");
	});

	it("cannot be noticed where the cache was removed, and that is reported", async () => {
		const place = workspace(folder);
		await onDataset(place, counted(many(22)), SAVING, dyingAt(4))
			.train()
			.catch(() => {});
		rmSync(join(place.out, ".cache"), { recursive: true });
		const all = await events(onDataset(place, counted(many(22)), { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(ofType(all, "notice").map(({ message }) => message)).toContainEqual(
			expect.stringContaining("a change of train_dataset would go unnoticed"),
		);
	});
});

describe("what is kept of rows from code", () => {
	const runFolders = (cache: string) => readdirSync(cache).filter((name) => name.startsWith("run-"));

	it("is replaced with the run in its output_dir, and goes where the run does not begin", async () => {
		const place = workspace(folder);
		const cache = join(place.out, ".cache");
		await onDataset(place, many(22), SAVING).train();
		const [first] = runFolders(cache);
		await onDataset(place, many(22), { overwrite_output_dir: true }).train();
		expect(runFolders(cache)).toHaveLength(1);
		expect(runFolders(cache)).not.toEqual([first]);
		const shared = join(place.out, "shared");
		const bad = await errorOf(
			onDataset({ ...place, out: `${place.out}-2` }, [row("a"), {} as RecordData], { cache_dir: shared }).train(),
		);
		expect(bad.code).toBe("ARL_DATA");
		expect(runFolders(shared)).toEqual([]);
	});

	it("stays where a run that goes on is refused", async () => {
		const place = workspace(folder);
		await onDataset(place, many(22), SAVING, dyingAt(4))
			.train()
			.catch(() => {});
		const before = runFolders(join(place.out, ".cache"));
		await errorOf(onDataset(place, many(23), { ...SAVING, resume_from_checkpoint: "latest" }).train());
		expect(runFolders(join(place.out, ".cache"))).toEqual(before);
		expect(before).toHaveLength(1);
	});
});
