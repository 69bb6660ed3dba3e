import { mkdirSync, mkdtempSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { gzipSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { duckParquet, readRows } from "./support/tables.js";

const parent = temporaryFolder();

/** A folder with files that each hold one row: their own path. */
function folderOf(...paths: string[]): string {
	const folder = mkdtempSync(join(parent, "folder-"));
	for (const path of paths) {
		mkdirSync(dirname(join(folder, path)), { recursive: true });
		const row = `{"path":${JSON.stringify(path)}}\n`;
		writeFileSync(join(folder, path), path.endsWith(".gz") ? gzipSync(row) : row);
	}
	return folder;
}

const pathsOf = async (folder: string, split?: string) =>
	(await readRows([folder], split === undefined ? {} : { split })).rows.map((row) => JSON.parse(row).path);

describe("a folder of rows", () => {
	const layouts: [string, string[], string, string[]][] = [
		[
			"data/ as on the Hub",
			[
				"README.md",
				"data/train-00000-of-00002.jsonl",
				"data/train-00001-of-00002.jsonl",
				"data/test-00000-of-00001.jsonl",
			],
			"train",
			["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
		],
		["a file for each split", ["train.jsonl", "validation.jsonl"], "validation", ["validation.jsonl"]],
		[
			"a folder for each split",
			["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
			"train",
			["train/a.jsonl", "train/b.jsonl"],
		],
		["other words for a split", ["my_train_set.jsonl", "my-dev.jsonl"], "valid", ["my-dev.jsonl"]],
		["words within a name", ["gsm8k-train.jsonl", "gsm8k-test.jsonl"], "train", ["gsm8k-train.jsonl"]],
		["a split by a name of its own", ["sft.jsonl", "rl.jsonl"], "rl", ["rl.jsonl"]],
		["no splits at all", ["a.jsonl", "b.jsonl.gz", "_SUCCESS", ".cache/c.jsonl"], "train", ["a.jsonl", "b.jsonl.gz"]],
		["what describes a data set", ["train.json", "dataset_infos.json", "state.json"], "train", ["train.json"]],
		["training is no split of a name that only contains it", ["constrained.jsonl"], "train", ["constrained.jsonl"]],
	];
	it.each(layouts)("%s", async (_, paths, split, expected) => {
		expect(await pathsOf(folderOf(...paths), split)).toEqual(expected);
	});

	it("gives all its files where no split is asked for", async () => {
		const folder = folderOf("train.jsonl", "test.jsonl", "extra.jsonl");
		const { rows, notices } = await readRows([folder], { split: null });
		expect(rows.map((row) => JSON.parse(row).path)).toEqual(["extra.jsonl", "test.jsonl", "train.jsonl"]);
		expect(notices).toEqual([]);
	});

	it("says what it leaves out", async () => {
		const folder = folderOf("train.jsonl", "test-1.jsonl", "test-2.jsonl", "extra.jsonl");
		const { notices } = await readRows([folder]);
		expect(notices).toEqual([
			`${folder}: 1 of 4 files belong to the split train; left out are none (1 file), test (2 files)`,
		]);
	});

	it("may hold Parquet", async () => {
		const folder = folderOf();
		for (const part of [0, 1]) {
			await duckParquet(join(folder, `train-0000${part}-of-00002.parquet`), `select ${part} as part`);
		}
		const { rows, places } = await readRows([folder]);
		expect(rows).toEqual(['{"part":0}', '{"part":1}']);
		expect(places[1]).toBe(`${join(folder, "train-00001-of-00002.parquet")}[0]`);
	});

	const refused: [string, string[], string, RegExp, RegExp][] = [
		[
			"a missing part",
			["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
			"train",
			/1 of 3 parts .* missing: 1/,
			/./,
		],
		[
			"a split that is not there",
			["train.jsonl", "test.jsonl"],
			"dev",
			/no file belongs to the split dev; there are test \(1 file\), train/,
			/--split/,
		],
		["a split where names tell none", ["a.jsonl"], "test", /contain no splits/, /--split/],
		["several folders", ["main/train.jsonl", "other/train.jsonl"], "train", /2 of its folders: main, other/, /\*\*/],
		["several kinds", ["train.jsonl", "train.csv"], "train", /jsonl \(1 file\)/, /\*\.csv/],
		["no rows", ["README.md"], "train", /no files of rows/, /\.parquet/],
		[
			"what save_to_disk writes",
			["data-00000-of-00001.arrow", "state.json"],
			"train",
			/no files of rows/,
			/to_parquet/,
		],
	];
	it.each(refused)("%s: says what, and what to do", async (_, paths, split, message, hint) => {
		const folder = folderOf(...paths);
		const error = await errorOf(readRows([folder], { split }));
		expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		expect(error.message).toMatch(message);
		expect(error.message).toContain(folder);
		expect(error.hint).toMatch(hint);
	});
});
