/** `eval_split`: rows that are held out by their content, or by the name of a split. */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { describe, expect, it } from "vitest";
import { createTrainer, type QwenTrainerOptions } from "../src/api/trainer.js";
import { cutByContent, isHeldOut, SubsetSource } from "../src/data/sources/content-split.js";
import { openJsonl } from "../src/data/sources/jsonl.js";
import { refused } from "./support/config.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { chatRow, events, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();

/** A file of these rows, and its rows that are held out and those that are left. */
async function cut(name: string, rows: readonly string[], share: number, seed = 42) {
	const path = join(folder, name);
	writeFileSync(path, `${rows.join("\n")}\n`);
	const source = await openJsonl(path);
	try {
		const { rest, heldOut } = await cutByContent(source, share, seed, null);
		const texts = (numbers: Uint32Array) => [...numbers].map((row) => rows[row] ?? "");
		return { rest: texts(rest), heldOut: texts(heldOut), numbers: heldOut };
	} finally {
		await source.close();
	}
}

const many = (count: number) => Array.from({ length: count }, (_, i) => chatRow(`row ${i}`));

describe("a cut by content", () => {
	it("holds out about the share of the rows, each row on one side", async () => {
		const rows = many(4000);
		const { rest, heldOut } = await cut("share.jsonl", rows, 0.05);
		// 200 are expected; five standard deviations are 69.
		expect(Math.abs(heldOut.length - 200)).toBeLessThan(69);
		expect([...rest, ...heldOut].sort()).toEqual([...rows].sort());
	});

	it("holds out the same rows in any order, among any others, and never a row on both sides", async () => {
		const rows = many(300);
		const { heldOut } = await cut("order.jsonl", rows, 0.2);
		const other = await cut(
			"other.jsonl",
			[...rows].reverse().flatMap((row, i) => [row, chatRow(`new ${i}`), row]),
			0.2,
		);
		const known = new Set(rows);
		const again = other.heldOut.filter((row) => known.has(row));
		expect([...new Set(again)].sort()).toEqual([...heldOut].sort());
		// Each came twice.
		expect(again.length).toBe(2 * heldOut.length);
		expect(other.rest.some((row) => new Set(heldOut).has(row))).toBe(false);
	});

	it("holds out more of the same with a larger share, and others with another seed", async () => {
		const rows = many(300);
		const [few, more, seeded] = [await cut("a", rows, 0.1), await cut("a", rows, 0.3), await cut("a", rows, 0.1, 7)];
		expect(few.heldOut.every((row) => more.heldOut.includes(row))).toBe(true);
		expect(seeded.heldOut).not.toEqual(few.heldOut);
	});

	it("is the same on every machine", () => {
		const row = Buffer.from('{"text":"a"}');
		// printf 'arl eval_split 42\n{"text":"a"}' | sha256sum: the first 12 digits over 16^12.
		const share = 0xc79bfdac7123 / 16 ** 12;
		expect(isHeldOut(row, share + 1e-9, 42)).toBe(true);
		expect(isHeldOut(row, share - 1e-9, 42)).toBe(false);
	});

	it("names rows by where they are in the file", async () => {
		const path = join(folder, "places.jsonl");
		writeFileSync(path, `${many(5).join("\n")}\n`);
		const source = await openJsonl(path);
		const subset = new SubsetSource(source, Uint32Array.of(1, 4), "x", true);
		expect(subset.length).toBe(2);
		expect(subset.location(1)).toBe(source.location(4));
		expect(subset.bytes(0)).toBe(source.bytes(1));
		const [last, first] = await subset.read([1, 0]);
		expect(Buffer.from(last as Uint8Array).toString()).toContain("row 4");
		expect(Buffer.from(first as Uint8Array).toString()).toContain("row 1");
		expect(subset.identity).not.toBe(new SubsetSource(source, Uint32Array.of(1, 4), "y", false).identity);
		await subset.close();
	});
});

describe("eval_split of a run", () => {
	it("trains the rest, evaluates what is held out, and resumes with the same", async () => {
		const place = workspace(folder, 60);
		const options = {
			eval_split: 0.2,
			eval_strategy: "epoch" as const,
			num_train_epochs: 1,
			save_strategy: "steps" as const,
		};
		const all = await events(trainer(place, options));
		const { heldOut } = await cut("same.jsonl", rowsOf(place.file), 0.2);
		expect(heldOut.length).toBeGreaterThan(0);
		expect(ofType(all, "start")[0]?.data.rows).toBe(60 - heldOut.length);
		const found = ofType(all, "check").find(({ name }) => name === "held-out rows");
		expect(found?.message).toBe(`${heldOut.length} rows of messages in ${place.file}`);
		// The same figures as the very rows in a file of their own.
		const file = join(dirname(place.file), "held-out.jsonl");
		writeFileSync(file, `${heldOut.join("\n")}\n`);
		const { eval_split: _, ...rest } = options;
		const alone = workspace(folder, 60);
		const other = await events(trainer(alone, { ...rest, eval_file: file, eval_on_start: true }));
		const started = await events(trainer({ ...place, out: `${place.out}-2` }, { ...options, eval_on_start: true }));
		expect(ofType(started, "evaluate")[0]?.metrics.eval_loss).toBe(ofType(other, "evaluate")[0]?.metrics.eval_loss);
		const changed = { ...options, eval_split: 0.3, resume_from_checkpoint: "latest", num_train_epochs: 2 };
		expect(await errorOf(() => trainer(place, changed).train())).toMatchObject({ code: "ARL_STATE" });
		await events(trainer(place, { ...options, resume_from_checkpoint: "latest" }));
	});

	it("by name takes the files of that split from each folder of train_file", async () => {
		const place = workspace(folder, 10);
		const data = join(dirname(place.file), "data");
		mkdirSync(data);
		writeFileSync(join(data, "train.jsonl"), `${many(12).join("\n")}\n`);
		writeFileSync(join(data, "validation.jsonl"), `${many(5).join("\n")}\n`);
		const options = { train_file: data, eval_split: "validation", eval_on_start: true, max_steps: 1 };
		const all = await events(trainer(place, options));
		expect(ofType(all, "start")[0]?.data.rows).toBe(12);
		const found = ofType(all, "check").find(({ name }) => name === "held-out rows");
		expect(found?.message).toBe(`5 rows of messages in ${join(data, "validation.jsonl")}`);
		const files = await errorOf(() => trainer(workspace(folder), { ...options, train_file: place.file }).train());
		expect(files).toMatchObject({ code: "ARL_CONFIG" });
		expect(files.message).toBe(
			"eval_split validation: neither a folder nor a database is given, and files have no splits",
		);
	});

	it("is refused where it would hold out nothing, or what is trained", async () => {
		const place = workspace(folder, 3);
		const none = await errorOf(() => trainer(place, { eval_split: 1e-6, eval_on_start: true }).train());
		expect(none).toMatchObject({
			code: "ARL_DATA",
			message: `eval_split 0.000001 holds out none of the 3 rows of ${place.file}`,
		});
		const { args } = trainer(place, { eval_split: 0.5, eval_on_start: true });
		const train_dataset = { length: 4, get: (i: number) => JSON.parse(chatRow(`${i}`)) };
		const options = { args: { ...args, train_file: [] }, train_dataset } as QwenTrainerOptions;
		const lazy = await errorOf(() => createTrainer(options, () => fakeNative()).train());
		expect(lazy).toMatchObject({ code: "ARL_CONFIG" });
		expect(lazy.hint).toContain("eval_dataset");
		expect(refused(["--eval_split", "1"]).message).toContain("above 0 and below 1");
		expect(refused(["--eval_split", "train"]).message).toContain("the held-out rows would be trained");
		expect(refused(["--eval_split", "validation", "--split", "none"]).message).toContain("would be trained");
		expect(refused(["--eval_split", "0.1", "--eval_file", "a"]).message).toContain("contradicts eval_file");
		const database = ["--db_connection_string", "mongodb://host/db"];
		expect(refused(["--eval_split", "0.1", ...database]).message).toContain("rows of a database are not cut");
	});
});

function rowsOf(file: string): string[] {
	return readFileSync(file, "utf8").trimEnd().split("\n");
}
