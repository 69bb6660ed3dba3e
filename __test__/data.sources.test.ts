import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { QwenTrainer } from "../src/api/trainer.js";
import { objectEntries } from "../src/data/sources/json-scan.js";
import { writeParquet } from "../src/data/sources/parquet/write.js";
import { ParquetDataset, type RecordData } from "../src/index.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, flags, metricsOf, type Place, tinyPlace } from "./support/real.js";
import { events, numbers, type Options, ofType } from "./support/run.js";
import { duckParquet } from "./support/tables.js";

const folder = temporaryFolder();

function options(place: Place, name: string) {
	return {
		model_name_or_path: place.model,
		output_dir: `${place.out}-${name}`,
		init_from_config: true,
		per_device_train_batch_size: 4,
		num_train_epochs: 2,
		learning_rate: 1e-2,
		logging_steps: 1,
		save_strategy: "no" as const,
	};
}

/** Steps in bits, and the rows' counts. */
async function trained(trainer: QwenTrainer) {
	const all = await events(trainer);
	return { steps: numbers(all), shape: ofType(all, "check").find(({ name }) => name === "rows")?.message };
}

function fromFile(place: Place, name: string, file: string, more: Options = {}) {
	return trained(new QwenTrainer({ args: { ...options(place, name), ...more, train_file: [file] } }));
}

/** Floats, large integers, key order, null and absent keys: all that a row can lose on its way. */
const TOOL_ROWS = Array.from({ length: 12 }, (_, i) => {
	const number = i % 2 === 0 ? "1.0" : "1";
	const tool = `{"type":"function","function":{"name":"f${i}","description":"d","parameters":{"type":"object","properties":{"b":{"type":"number","default":${number}},"a":{"default":null,"maximum":9007199254740993}},"required":["b"]}}}`;
	return `{"messages":[{"role":"user","content":"q ${i}"},{"role":"assistant","content":"first"},{"role":"user","content":"line\\nbreak, \\"quote\\""},{"role":"assistant","content":null,"tool_calls":[{"type":"function","function":{"name":"f${i}","arguments":{"b":${number},"a":[]}}}]}],"tools":[${tool}],"advantages":{"3":${number}}}`;
});

const quoted = (text: string) => `"${text.replaceAll('"', '""')}"`;

/** The same rows as CSV, each value's text as it is. */
function csvOf(rows: string[]): string {
	const lines = rows.map((row) => {
		const values = objectEntries(Buffer.from(row))?.map(([, value]) => quoted(Buffer.from(value).toString("utf8")));
		return values?.join(",");
	});
	return `messages,tools,advantages\r\n${lines.join("\r\n")}\r\n`;
}

describe("the same rows from other files", { timeout: 120_000 }, () => {
	it("give equal losses in bits: Parquet of JSON text, CSV, and ParquetDataset", async () => {
		const place = tinyPlace(folder);
		writeFileSync(place.file, `${TOOL_ROWS.join("\n")}\n`);
		const parquet = join(folder, "tools.parquet");
		await writeParquet(parquet, TOOL_ROWS);
		const csv = join(folder, "tools.csv");
		writeFileSync(csv, csvOf(TOOL_ROWS));
		const expected = await fromFile(place, "jsonl", place.file);
		expect(expected.steps).toHaveLength(6);
		expect((await fromFile(place, "parquet", parquet)).steps).toEqual(expected.steps);
		expect((await fromFile(place, "csv", csv)).steps).toEqual(expected.steps);
		const args = options(place, "dataset");
		const dataset = new ParquetDataset({ file_paths: parquet, args, split: "train" });
		expect((await trained(new QwenTrainer({ args, train_dataset: dataset }))).steps).toEqual(expected.steps);
		// And the rows are such that a lost float or null would have shown.
		const lost = TOOL_ROWS.map((row) => JSON.stringify(JSON.parse(row)));
		writeFileSync(place.file, `${lost.join("\n")}\n`);
		expect((await fromFile(place, "lost", place.file)).steps).not.toEqual(expected.steps);
	});

	it("give equal losses in bits from Parquet with structs and lists, packed and in the order of the file", async () => {
		const place = tinyPlace(folder, 200);
		const parquet = join(folder, "structs.parquet");
		const query = `select * from read_json('${place.file}', format = 'newline_delimited')`;
		await duckParquet(parquet, query, "codec zstd, row_group_size 2048");
		const more: Options[] = [
			{},
			{ per_device_train_batch_size: undefined, max_tokens_per_micro_batch: 2000 },
			{ train_sampling_strategy: "sequential", max_steps: 5 },
		];
		for (const [i, options] of more.entries()) {
			const expected = await fromFile(place, `jsonl-${i}`, place.file, options);
			expect((await fromFile(place, `parquet-${i}`, parquet, options)).steps).toEqual(expected.steps);
		}
	});

	it("are trained from the command line, a folder at a time, with the row named that cannot be used", async () => {
		const place = tinyPlace(folder);
		const lines = readFileSync(place.file, "utf8").trimEnd().split("\n");
		const hub = join(folder, "hub-train.parquet");
		await writeParquet(hub, lines);
		const { output_dir, ...rest } = options(place, "cli");
		const command = (file: string, out: string) =>
			arl(["train", ...flags({ ...rest, output_dir: out, train_file: file, max_steps: 3 })]);
		expect((await command(hub, output_dir)).code).toBe(0);
		expect((await command(place.file, `${output_dir}-jsonl`)).code).toBe(0);
		const losses = (out: string) => metricsOf(out).map(({ loss }) => loss);
		expect(losses(output_dir)).toEqual(losses(`${output_dir}-jsonl`));
		await writeParquet(hub, [...lines, '{"messages":[{"role":"user","content":"no reply"}]}']);
		const bad = await command(hub, `${output_dir}-bad`);
		expect(bad.code).toBe(3);
		expect(bad.stderr).toContain(`hub-train.parquet[${lines.length}]`);
	});
});

describe("ParquetDataset", () => {
	it("gives each row as an object, and takes files, lists of files and URLs", async () => {
		const place = tinyPlace(folder, 3);
		const lines = readFileSync(place.file, "utf8").trimEnd().split("\n");
		const path = join(folder, "three.parquet");
		await writeParquet(path, lines);
		const rows: RecordData[] = [];
		for await (const row of new ParquetDataset({ file_paths: [path, new URL(`file://${path}`)] })) rows.push(row);
		expect(rows).toEqual([...lines, ...lines].map((line) => JSON.parse(line)));
	});

	it("takes the files of its split, by its own option before that of args", async () => {
		const hub = mkdtempSync(join(folder, "hub-"));
		await duckParquet(join(hub, "train.parquet"), "select 'train' as text");
		await duckParquet(join(hub, "test.parquet"), "select 'test' as text");
		const texts = async (dataset: ParquetDataset) => {
			const found: unknown[] = [];
			for await (const row of dataset) found.push(Reflect.get(row, "text"));
			return found;
		};
		expect(await texts(new ParquetDataset({ file_paths: hub }))).toEqual(["train"]);
		expect(await texts(new ParquetDataset({ file_paths: hub, args: { split: "test" } }))).toEqual(["test"]);
		expect(await texts(new ParquetDataset({ file_paths: hub, args: { split: "test" }, split: "train" }))).toEqual([
			"train",
		]);
		const error = await errorOf(texts(new ParquetDataset({ file_paths: hub, split: "validation" })));
		expect(error.message).toContain("no file belongs to the split validation");
	});
});
