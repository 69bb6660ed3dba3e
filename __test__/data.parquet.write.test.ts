import { readFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { writeParquet } from "../src/data/sources/parquet/write.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";
import { duck, readRows } from "./support/tables.js";

const folder = temporaryFolder();
let files = 0;
const file = () => join(folder, `rows-${files++}.parquet`);

async function roundTrip(rows: string[]): Promise<string[]> {
	const path = file();
	expect(await writeParquet(path, rows)).toBe(rows.length);
	return (await readRows([path])).rows;
}

describe("rows written as Parquet", () => {
	it("are the same bytes when they are read again", async () => {
		const rows = [
			'{"messages":[{"role":"user","content":"ä\\u0001\\n"},{"role":"assistant","content":null,"weight":1.0}],"tools":[{"default":null,"n":1e400}],"advantages":{"1":0.50},"reward":1.0,"step":9007199254740993,"record_id":"a\\"b"}',
			'{"messages":[],"tools":null,"reward":-0.25}',
			'{"messages":[],"scores":{},"step":-1,"extra":{"b": 1, "a": [1.0]}}',
			'{"messages":[],"split":"train","extra":"text"}',
			"{}",
		];
		expect(await roundTrip(rows)).toEqual(rows);
	});

	it("keep null in columns where no row lacks the key", async () => {
		const rows = ['{"reward":null,"record_id":"x"}', '{"reward":0.5,"record_id":null}'];
		expect(await roundTrip(rows)).toEqual(rows);
	});

	it("are the same as the JSONL file, over several row groups", async () => {
		const lines = readFileSync(join(root, "assets", "train.jsonl"), "utf8")
			.trimEnd()
			.split("\n");
		const rows = Array.from({ length: 7 }, () => lines).flat();
		const path = file();
		async function* stream() {
			for (const row of rows) yield Buffer.from(row);
		}
		expect(await writeParquet(path, stream())).toBe(rows.length);
		expect((await readRows([path])).rows).toEqual(rows);
	});

	it("can be read by others: numbers as numbers, lists as JSON text", async () => {
		const path = file();
		await writeParquet(path, ['{"messages":[{"role":"user"}],"reward":1,"step":3,"record_id":"x"}']);
		const read = await duck(
			`select reward, step, record_id, messages, json_extract_string(messages, '$[0].role') as role from '${path}'`,
		);
		expect(read).toEqual([{ reward: 1, step: 3n, record_id: "x", messages: '[{"role":"user"}]', role: "user" }]);
	});

	it("leave nothing behind where a row cannot be written, and name it", async () => {
		const bad: [string[], RegExp][] = [
			[["{}", "[]"], /row 1: is no JSON object/],
			[['{"step":1.5}'], /row 0: step: expected an integer of 64 bits, got 1\.5/],
			[['{"step":9223372036854775808}'], /step: expected an integer/],
			[['{"reward":"1"}'], /reward: expected a number/],
			[['{"reward":9007199254740993}'], /reward: expected a number/],
			[['{"record_id":7}'], /record_id: expected a string/],
			[[...Array(10_000).fill('{"step":1}'), '{"late":1}'], /row 10000: has the key "late"/],
		];
		for (const [rows, message] of bad) {
			const path = file();
			const error = await errorOf(writeParquet(path, rows));
			expect(error.code).toBe("ARL_DATA");
			expect(error.message).toMatch(message);
			expect((await readdir(folder)).filter((name) => path.includes(name.replace(".partial", "")))).toEqual([]);
		}
	});
});
