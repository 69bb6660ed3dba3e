import { mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { DataReport } from "../src/api/check-rows.js";
import { summarize } from "../src/api/length-summary.js";
import { temporaryFolder } from "./support/folder.js";
import { arl, flags, root, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const model = join(root, "assets", "model");
const lines = readFileSync(join(root, "assets", "train.jsonl"), "utf8")
	.split("\n")
	.slice(0, 60);

/** A file of rows in a folder of its own. */
function write(rows: readonly string[], name = "rows.jsonl"): string {
	const path = join(mkdtempSync(join(folder, "check-")), name);
	writeFileSync(path, `${rows.join("\n")}\n`);
	return path;
}

const check = (...words: string[]) => arl(["data", "check", "--model_name_or_path", model, ...words]);

async function report(...words: string[]): Promise<DataReport & { code: number | null }> {
	const { stdout, stderr, code } = await check(...words, "--json");
	expect(stderr).toBe("");
	return { ...JSON.parse(stdout), code };
}

describe("arl data check", () => {
	it("finds nothing wrong with good rows, exits with 0, and leaves nothing behind", async () => {
		// Folders of its own: other tests use the user's.
		const place = mkdtempSync(join(folder, "tmp-"));
		const env = { XDG_CACHE_HOME: place, TMPDIR: place };
		const words = ["data", "check", "--model_name_or_path", model, "--train_file", write(lines)];
		const ended = await arl(words, undefined, undefined, env);
		expect(ended.code, ended.stderr).toBe(0);
		expect(ended.stdout).toMatch(/^60 rows of messages, 60 can be trained\n/);
		expect(ended.stdout).toMatch(/\ntrained: 60 of 60 rows \(100\.0 %\), /);
		expect(readdirSync(place, { recursive: true })).toEqual(["arl"]);
	});

	it("counts the tokens and targets that training has", async () => {
		const place = tinyPlace(folder, 40);
		const rows = { model_name_or_path: place.model, train_file: place.file };
		const run = await arl([
			"train",
			...flags({ ...rows, output_dir: place.out, init_from_config: true, max_steps: 1, threads: 1 }),
			"--json",
		]);
		const events = run.stdout
			.trim()
			.split("\n")
			.map((line) => JSON.parse(line));
		const fill = events.find((event) => event.type === "fill" && event.complete);
		const checked = await arl(["data", "check", ...flags(rows), "--json"]);
		const { tokens, targetTokens, usable } = JSON.parse(checked.stdout);
		expect([usable, tokens.sum, targetTokens.sum]).toEqual([fill.rows, fill.tokens, fill.targetTokens]);
	});

	it("names each bad row of every source with place and reason, and exits with 3", async () => {
		const first = write([...lines.slice(0, 3), "nope", '{"messages": []}'], "a.jsonl");
		const second = write(['{"messages": [{"role": "robot", "content": ""}]}', "", ...lines.slice(3, 6)], "b.jsonl");
		const found = await report("--train_file", first, second);
		expect(found.code).toBe(3);
		expect(found.bad.map(({ location, reason }) => [location, reason])).toEqual([
			[`${first}:4`, "not json"],
			[`${first}:5`, "no messages"],
			[`${second}:1`, "unknown role"],
		]);
		expect(found.reasons).toEqual({ "no messages": 1, "not json": 1, "unknown role": 1 });
		expect(found).toMatchObject({ rows: 9, usable: 6, blankLines: 1, trainedRows: 6 });
		const text = await check("--train_file", first, second);
		expect(text.code).toBe(3);
		expect(text.stdout).toContain(`bad rows: 3 (1 no messages, 1 not json, 1 unknown role)\n  ${first}:4: not json:`);
	});

	it("finds rows that are the same by what is trained, however they are written and named", async () => {
		const value = JSON.parse(lines[0] as string);
		const other = JSON.stringify({ record_id: "other", ...value }, null, 1).replaceAll("\n", " ");
		const muted = { ...value, messages: value.messages.map((message: object) => ({ weight: 0.5, ...message })) };
		const file = write([lines[0] as string, lines[1] as string, other, lines[0] as string, JSON.stringify(muted)]);
		const found = await report("--train_file", file);
		expect(found.duplicateRows).toBe(2);
		expect(found.duplicates).toEqual([{ locations: [`${file}:1`, `${file}:3`, `${file}:4`], rows: 3 }]);
		expect(found.code).toBe(0);
	});

	it.each(["error", "drop", "left", "right"])(
		"names rows that are too long, with truncation %s",
		async (truncation) => {
			const file = write(lines);
			const all = await report("--train_file", file);
			const longest = all.tokens.max;
			const limit = longest - 1;
			const found = await report("--train_file", file, "--max_length", String(limit), "--truncation", truncation);
			expect(found.overLong.length).toBeGreaterThan(0);
			expect(found.overLong.every(({ tokens }) => tokens === longest)).toBe(true);
			expect(found.maxLength).toBe(limit);
			const many = found.overLong.length;
			expect(found.dropped).toBe(truncation === "drop" ? many : 0);
			expect(found.truncated).toBe(truncation === "left" || truncation === "right" ? many : 0);
			expect(found.reasons).toEqual(truncation === "error" ? { "too long": many } : {});
			expect(found.code).toBe(truncation === "error" ? 3 : 0);
			expect(found.tokens.max).toBeLessThan(longest);
		},
	);

	it("names rows that fit no micro-batch", async () => {
		const found = await report("--train_file", write(lines), "--max_tokens_per_micro_batch", "200");
		expect(found.reasons["fits no micro-batch"]).toBeGreaterThan(0);
		expect(found.code).toBe(3);
	});

	it("looks through converting functions and data sets, and tells the share of each entry", async () => {
		const file = write(lines);
		const raw = `const rows = require("node:fs").readFileSync(${JSON.stringify(file)}, "utf8").trim().split("\\n");`;
		const dataset = write(
			[`${raw}\nexport default { length: 10, get: (i: number) => JSON.parse(rows[i]) };`],
			"rows.ts",
		);
		const mixed = await report(
			"--train_file",
			file,
			"--dataset",
			dataset,
			..."--train_weights 1 1 --train_caps 30 none".split(" "),
		);
		expect(mixed.entries).toEqual([
			{ name: file, rows: 60, usable: 60, rowsPerEpoch: 20 },
			{ name: "train_dataset", rows: 10, usable: 10, rowsPerEpoch: 20 },
		]);
		expect(mixed.trainedRows).toBe(30);
		expect(mixed.duplicateRows).toBe(10);
		const convert = write(
			[
				"let n = 0;",
				"export default (row: object) => { n += 1; if (n === 2) throw new Error('two'); return n % 3 === 0 ? null : [row, row]; };",
			],
			"convert.ts",
		);
		const converted = await report("--train_file", file, "--convert", convert);
		expect(converted).toMatchObject({ rows: 79, usable: 78, leftOut: 20, code: 3 });
		expect(converted.bad).toMatchObject([{ location: `${file}:2`, reason: "conversion failed" }]);
		expect(converted.duplicates[0]?.locations).toEqual([`${file}:1 (its row 1)`, `${file}:1 (its row 2)`]);
	});

	it("gives modules the program's own public API, whether they import all of it or a part", async () => {
		const row = lines[0] as string;
		const dataset = write(
			['import { ArlError } from "arl";', `export default typeof ArlError === "function" ? [${row}] : [];`],
			"rows.ts",
		);
		const convert = write(
			['import * as arl from "arl";', 'export default (row: object) => ("QwenTrainer" in arl ? [row, row] : null);'],
			"convert.ts",
		);
		expect(await report("--dataset", dataset)).toMatchObject({ rows: 1, usable: 1, code: 0 });
		expect(await report("--train_file", write([row]), "--convert", convert)).toMatchObject({ rows: 2, usable: 2 });
	});

	it("looks at as many rows of a stream without an end as the run would train", async () => {
		const row = lines[0] as string;
		const endless = write([`export default function* () { for (;;) yield ${row}; }`], "endless.ts");
		const words = "--train_sampling_strategy sequential --max_steps 5 --per_device_train_batch_size 4".split(" ");
		const found = await report("--dataset", endless, ...words);
		expect(found).toMatchObject({ rows: 20, usable: 20, duplicateRows: 19, trainedRows: 20, code: 0 });
	});

	it("tells what there is to know of how files are read", async () => {
		const found = await report("--train_file", write(lines.slice(0, 3)), "--split", "valid");
		expect(found).toMatchObject({
			code: 0,
			rows: 3,
			notices: [expect.stringContaining("split valid chooses nothing")],
		});
		const { stdout } = await check("--train_file", write(lines.slice(0, 3)), "--split", "valid");
		expect(stdout).toContain("split valid chooses nothing");
	});

	it("needs the name of what to check, and knows no other word", async () => {
		expect((await arl(["data"])).code).toBe(2);
		expect((await arl(["data", "mend"])).code).toBe(2);
		const none = await check();
		expect(none.code).toBe(2);
		expect(none.stderr).toContain("no rows are given");
		expect((await arl(["data", "check", "--help"])).stdout).toContain("Exit code 3 where a row cannot be used");
	});
});

describe("lengths summed up", () => {
	it("have the quantiles of their sorted values", () => {
		const lengths = Uint32Array.from({ length: 100 }, (_, i) => 100 - i);
		const { sum, min, median, p95, max } = summarize(lengths);
		expect({ sum, min, median, p95, max }).toEqual({ sum: 5050, min: 1, median: 50, p95: 95, max: 100 });
	});

	it.each([[[]], [[7]], [[0, 0]], [[1, 1_000_000]], [[5, 6, 7, 8, 9, 1000]], [[100, 150, 151, 199]]])(
		"fall into bins that touch and hold each length once: %j",
		(values) => {
			const { histogram } = summarize(Uint32Array.from(values));
			expect(histogram.reduce((total, { rows }) => total + rows, 0)).toBe(values.length);
			for (const [i, { from, to, rows }] of histogram.entries()) {
				expect(rows).toBe(values.filter((value) => value >= from && value < to).length);
				if (i > 0) expect(from).toBe(histogram[i - 1]?.to);
			}
			expect(histogram.length).toBeLessThan(30);
		},
	);
});
