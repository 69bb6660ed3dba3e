import { appendFileSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { createTrainer } from "../src/api/trainer.js";
import "../src/index.js";
import { CALLS_AT_ONCE } from "../src/data/sources/convert.js";
import type { RecordData } from "../src/data/sources/record.js";
import { argsOf, dyingAt, onConverted, onDataset, type Place, rowsOf } from "./support/code.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { chatRow, events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const SAVING: Options = { save_strategy: "steps", save_steps: 2 };
const STEPS: Options = { train_sampling_strategy: "sequential", max_steps: 7 };
const weights = (path: string) => readFileSync(join(path, "model.safetensors"), "utf8");
const chat = (text: string): RecordData => JSON.parse(chatRow(text));
const plain = (all: Awaited<ReturnType<typeof events>>) => numbers(all).map(({ epoch: _, ...rest }) => rest);

interface Raw {
	id: number;
	texts: string[];
}

/** Raw rows with 0 to 3 texts each, and the rows that `convert` makes of them in files of their own. */
function rawPlace(count = 22): Place & { raw: string } {
	const place = workspace(folder);
	const raws = Array.from(
		{ length: count },
		(_, id): Raw => ({
			id,
			texts: Array.from({ length: [1, 2, 0, 1, 3][id % 5] as number }, (_, i) => `answer ${id}.${i}`),
		}),
	);
	const raw = join(place.model, "..", "raw.jsonl");
	writeFileSync(raw, raws.map((row) => `${JSON.stringify(row)}\n`).join(""));
	writeFileSync(place.file, raws.flatMap(({ texts }) => texts.map((text) => `${chatRow(text)}\n`)).join(""));
	return { ...place, raw };
}

const toRows = ({ texts }: Raw): RecordData[] | RecordData | null => {
	const rows = texts.map(chat);
	return rows.length === 0 ? null : rows.length === 1 ? (rows[0] as RecordData) : rows;
};
const slowly = async (row: Raw) => {
	await new Promise((resolve) => setTimeout(resolve, (row.id * 7) % 5));
	return toRows(row);
};

const WAYS: [string, (raw: Raw) => ReturnType<typeof toRows> | Promise<ReturnType<typeof toRows>>, Options][] = [
	["sync", toRows, {}],
	["async", slowly, {}],
	["sync, as the rows come", toRows, STEPS],
	["async, as the rows come", slowly, STEPS],
];

describe("a converting function", () => {
	it.each(WAYS)("%s: its rows train as a file of them does, in bits", async (_, convert, options) => {
		const place = rawPlace();
		const fromFile = { ...place, out: `${place.out}-file` };
		const expected = await events(trainer(fromFile, options));
		const found = await events(onConverted(place, convert, { ...options, train_file: place.raw }));
		expect(plain(found)).toEqual(plain(expected));
		expect(weights(place.out)).toBe(weights(fromFile.out));
	});

	it.each(WAYS)("%s: a resumed run has the numbers of the run never stopped", async (_, convert, options) => {
		const place = rawPlace();
		const all = { ...SAVING, ...options, train_file: place.raw };
		const whole = { ...place, out: `${place.out}-whole` };
		const expected = await events(onConverted(whole, convert, all));
		await onConverted(place, convert, all, dyingAt(4))
			.train()
			.catch(() => {});
		const rest = await events(onConverted(place, convert, { ...all, resume_from_checkpoint: "latest" }));
		expect(ofType(rest, "resumed")[0]?.step).toBe(2);
		expect(numbers(rest)).toEqual(numbers(expected).filter(({ step }) => step > 2));
		expect(weights(place.out)).toBe(weights(whole.out));
	});

	it.each([{}, STEPS])("that gives other rows is noticed when the run goes on (%o)", async (options) => {
		const place = rawPlace();
		const all = { ...SAVING, ...options, train_file: place.raw };
		await onConverted(place, toRows, all, dyingAt(4))
			.train()
			.catch(() => {});
		const other = (row: Raw) => (row.id === 1 ? chat("another") : toRows(row));
		const error = await errorOf(onConverted(place, other, { ...all, resume_from_checkpoint: "latest" }).train());
		expect(error.code).toBe("ARL_STATE");
	});

	it("counts what it leaves out, and says so", async () => {
		const place = rawPlace();
		const all = await events(onConverted(place, toRows, { train_file: place.raw }));
		expect(ofType(all, "check").find(({ name }) => name === "rows")?.message).toContain(
			"4 left out by the converting function",
		);
		const other = { ...place, out: `${place.out}-other` };
		const streamed = await events(onConverted(other, toRows, { ...STEPS, train_file: place.raw, max_steps: 4 }));
		expect(ofType(streamed, "notice").map(({ message }) => message)).toContainEqual(
			expect.stringMatching(/^the converting function has left out [34] rows/),
		);
		const none = await errorOf(
			onConverted(other, () => null, { train_file: place.raw, overwrite_output_dir: true }).train(),
		);
		expect(none.message).toContain("has left out all 22");
	});

	it("that throws, sync or not, is reported with file and line, and follows on_bad_row", async () => {
		const place = rawPlace();
		const failing = (row: Raw) => {
			if (row.id === 3) throw new Error("no texts");
			if (row.id === 4) return Promise.reject(new Error("too late"));
			return row.id === 5 ? (undefined as unknown as null) : toRows(row);
		};
		for (const options of [{}, { ...STEPS, max_steps: 2 }]) {
			const error = await errorOf(onConverted(place, failing, { train_file: place.raw, ...options }).train());
			expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
			expect(error.message).toContain(`${place.raw}:4: conversion failed: the converting function threw: no texts`);
			expect(error.message).toContain(`${place.raw}:5: conversion failed: the converting function threw: too late`);
			expect(error.message).toContain(`${place.raw}:6: conversion failed: the converting function returned undefined`);
		}
		const all = await events(onConverted(place, failing, { train_file: place.raw, on_bad_row: "skip" }));
		expect(ofType(all, "rows_skipped")[0]?.reasons).toEqual({ "conversion failed": 3 });
	});

	it("names the raw row of each bad one among several, and the raw row that is no JSON", async () => {
		const place = rawPlace(5);
		appendFileSync(place.raw, "{\n");
		const bad = (row: Raw) => [chat("good"), { ...chat("a"), step: Number.NaN, record_id: String(row.id) }];
		const error = await errorOf(onConverted(place, bad, { train_file: place.raw }).train());
		expect(error.message).toContain(`${place.raw}:2 (its row 2): not json: cannot be written as JSON: step: NaN`);
		expect(error.message).toMatch(/^6 of \d+ rows cannot be used \(6 not json\)/);
	});

	it("is called in the order of the rows, with few calls at once", async () => {
		const place = rawPlace(60);
		const begun: number[] = [];
		let under = 0;
		let most = 0;
		const counting = async (row: Raw) => {
			begun.push(row.id);
			under += 1;
			most = Math.max(most, under);
			const rows = await slowly(row);
			under -= 1;
			return rows;
		};
		await onConverted(place, counting, { train_file: place.raw, max_steps: 1 }).train();
		expect(begun).toEqual(Array.from({ length: 60 }, (_, i) => i));
		expect(most).toBeLessThanOrEqual(CALLS_AT_ONCE);
		expect(most).toBeGreaterThan(1);
	});

	it("is applied to train_dataset too", async () => {
		const place = rawPlace();
		const raws: Raw[] = readFileSync(place.raw, "utf8")
			.trim()
			.split("\n")
			.map((line) => JSON.parse(line));
		const fromFile = { ...place, out: `${place.out}-file` };
		const expected = await events(trainer(fromFile));
		for (const data of [raws, { length: raws.length, get: (i: number) => raws[i] as Raw }]) {
			const out = mkdtempSync(`${place.out}-`);
			const options = { args: argsOf({ ...place, out }), train_dataset: data, convert_record_to_data_func: toRows };
			const found = await events(createTrainer(options, () => fakeNative()));
			expect(numbers(found)).toEqual(numbers(expected));
		}
	});
});

describe("modules of code", () => {
	const write = (name: string, content: string) => {
		const path = join(mkdtempSync(join(folder, "module-")), name);
		writeFileSync(path, content);
		return path;
	};

	it("convert: a TypeScript file's default export makes the rows", async () => {
		const place = rawPlace();
		const convert = write(
			"convert.ts",
			`import type { RecordData } from "arl";
			export default function (row: { texts: string[] }): RecordData[] {
				return row.texts.map((content) => ({ messages: [{ role: "user", content: "?" }, { role: "assistant", content }] }));
			}`,
		);
		const fromFile = { ...place, out: `${place.out}-file` };
		const expected = await events(trainer(fromFile));
		expect(numbers(await events(trainer(place, { train_file: place.raw, convert })))).toEqual(numbers(expected));
	});

	it("dataset: a data set, or a function that makes one of the run's options", async () => {
		const place = workspace(folder);
		const rows = JSON.stringify(rowsOf(place));
		const expected = await events(trainer(place));
		for (const content of [
			`export default ${rows};`,
			`import { type DatasetArguments, ArlError } from "arl";
			export default async ({ args, split }: DatasetArguments) => {
				if (split !== "train" || args.seed !== 42 || typeof ArlError !== "function") throw new Error("wrong");
				const rows = ${rows};
				return { length: rows.length, get: (i: number) => rows[i] };
			};`,
		]) {
			const out = mkdtempSync(`${place.out}-`);
			const found = await events(trainer({ ...place, out }, { train_file: [], dataset: write("rows.ts", content) }));
			expect(numbers(found)).toEqual(numbers(expected));
		}
	});

	it("import every entry of the package, as this very program", async () => {
		const place = workspace(folder);
		const rows = JSON.stringify(rowsOf(place));
		const content = `import { ArlError } from "arl";
			import { toDataUrl } from "arl/images";
			import { MongoRows } from "arl/mongo";
			if (toDataUrl({ bytes: Buffer.of(1), content_type: "image/png" }) !== "data:image/png;base64,AQ==") throw new Error();
			const wrong = await MongoRows.open({ db_connection_string: "none" }).catch((error) => error);
			export default wrong instanceof ArlError ? ${rows} : [];`;
		expect(
			(await trainer(place, { train_file: [], dataset: write("rows.ts", content) }).train()).steps,
		).toBeGreaterThan(0);
	});

	const bad: [string, Options, RegExp][] = [
		["no such file", { convert: "/nowhere/convert.ts" }, /^convert: .*ENOENT/],
		[
			"no function",
			{ convert: write("none.ts", "export default 7;") },
			/should be a function of a row, and it is of type/,
		],
		["one that throws as it loads", { convert: write("throws.ts", 'throw new Error("no luck");') }, /no luck/],
		["no data set", { dataset: write("none.ts", "export default 7;") }, /the default export: expected an iterable/],
		[
			"a function that fails",
			{ dataset: write("fails.ts", 'export default () => { throw new Error("mongodb://a:b@h is down"); };') },
			/fails\.ts: mongodb:\/\/\*\*\*@h is down/,
		],
	];
	it.each(bad)("%s is refused", async (_, options, message) => {
		const place = workspace(folder);
		const error = await errorOf(trainer(place, options).train());
		expect(error.code).toMatch(/ARL_(CONFIG|IO)/);
		expect(error.message).toMatch(message);
	});

	it("are not given twice", async () => {
		const place = workspace(folder);
		const convert = write("convert.ts", "export default (row: unknown) => row;");
		const error = await errorOf(onConverted(place, () => null, { convert }).train());
		expect(error.message).toBe("convert and convert_record_to_data_func are both given");
		const dataset = write("rows.ts", "export default [];");
		expect((await errorOf(onDataset(place, [], { dataset }).train())).message).toContain("are both given");
	});
});
