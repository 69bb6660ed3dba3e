/** The same rows in every kind of source that a run reads, and where a person finds each of them there. */
import { mkdirSync, mkdtempSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import type { Dataset } from "../../src/data/sources/custom.js";
import { objectEntries } from "../../src/data/sources/json-scan.js";
import { duckParquet } from "./tables.js";

/** Data packed as zstd without compressing it: one frame of raw blocks. */
export function zstd(bytes: Uint8Array): Buffer {
	const size = Buffer.alloc(4);
	size.writeUInt32LE(bytes.length);
	const parts = [Buffer.from([0x28, 0xb5, 0x2f, 0xfd, 0xa0]), size];
	const most = 128 * 1024;
	for (let at = 0; at === 0 || at < bytes.length; at += most) {
		const block = bytes.subarray(at, at + most);
		const header = Buffer.alloc(3);
		header.writeUIntLE((block.length << 3) | (at + most >= bytes.length ? 1 : 0), 0, 3);
		parts.push(header, Buffer.from(block));
	}
	return Buffer.concat(parts);
}

/** A frame that decoders pass over, as pzstd and seekable zstd write it. */
export const SKIPPABLE = Buffer.concat([Buffer.from([0x5e, 0x2a, 0x4d, 0x18, 3, 0, 0, 0]), Buffer.from("abc")]);

/** Rows as a run is given them. */
export interface Given {
	train_file?: string[];
	dataset?: Dataset<unknown>;
	/** Where row `index` is found. */
	location: (index: number) => string;
}

const quoted = (text: string) => `"${text.replaceAll('"', '""')}"`;

/** A table of each value's JSON. */
export function table(rows: readonly string[], separator: string): string {
	const all = rows.map((row) => objectEntries(Buffer.from(row)) ?? []);
	const names = all[0]?.map(([key]) => key) ?? [];
	const lines = all.map((entries) =>
		entries.map(([, value]) => quoted(Buffer.from(value).toString("utf8"))).join(separator),
	);
	return `${names.join(separator)}\n${lines.join("\n")}\n`;
}

type Make = (folder: string, rows: readonly string[]) => Given | Promise<Given>;

function file(name: string, bytes: string | Uint8Array, line: (index: number) => string): Make {
	return (folder) => {
		const path = join(folder, name);
		writeFileSync(path, bytes);
		return { train_file: [path], location: (index) => `${path}${line(index)}` };
	};
}

const byLine = (index: number) => `:${index + 1}`;
const belowHeader = (index: number) => `:${index + 2}`;
/** The array begins on a line of its own, and each row has two. */
const inArray = (index: number) => `:${2 * index + 2} (row ${index + 1})`;
const asArray = (rows: readonly string[]) => `[\n${rows.map((row) => row.replace(",", ",\n")).join(",\n")}\n]\n`;

async function* streamed(values: readonly unknown[]): AsyncGenerator<unknown> {
	yield* values;
}

function parquet(options: string): Make {
	return async (folder, rows) => {
		const lines = join(folder, "rows.jsonl");
		writeFileSync(lines, `${rows.join("\n")}\n`);
		const path = join(folder, "rows.parquet");
		await duckParquet(path, `select * from read_json('${lines}', format = 'newline_delimited')`, options);
		return { train_file: [path], location: (index) => `${path}[${index}]` };
	};
}

/** Two files, the second with the later half of the rows. */
function halves(name: (folder: string) => string): Make {
	return (folder, rows) => {
		const half = Math.floor(rows.length / 2);
		mkdirSync(join(folder, "hub"));
		const path = (part: number) => join(folder, "hub", `train-0000${part}-of-00002.jsonl`);
		for (const part of [0, 1])
			writeFileSync(path(part), `${rows.slice(part * half, part === 0 ? half : undefined).join("\n")}\n`);
		return {
			train_file: [name(join(folder, "hub"))],
			location: (index) => (index < half ? `${path(0)}:${index + 1}` : `${path(1)}:${index - half + 1}`),
		};
	};
}

const lines = (rows: readonly string[]) => `${rows.join("\n")}\n`;

/** Every kind by its name. */
export const KINDS: readonly [name: string, make: Make][] = [
	["JSONL", (folder, rows) => file("rows.jsonl", lines(rows), byLine)(folder, rows)],
	[
		"JSONL with a byte order mark, blank lines and \\r\\n",
		(folder, rows) =>
			file("rows.jsonl", `\uFEFF${rows.join("\r\n\r\n")}\r\n`, (index) => `:${2 * index + 1}`)(folder, rows),
	],
	["JSONL in gzip", (folder, rows) => file("rows.jsonl.gz", gzipSync(lines(rows)), byLine)(folder, rows)],
	["JSONL in zstd", (folder, rows) => file("rows.jsonl.zst", zstd(Buffer.from(lines(rows))), byLine)(folder, rows)],
	[
		"JSONL in zstd behind a skippable frame",
		(folder, rows) =>
			file("rows.jsonl.zst", Buffer.concat([SKIPPABLE, zstd(Buffer.from(lines(rows)))]), byLine)(folder, rows),
	],
	["a JSON array", (folder, rows) => file("rows.json", asArray(rows), inArray)(folder, rows)],
	["a JSON array in gzip", (folder, rows) => file("rows.json.gz", gzipSync(asArray(rows)), inArray)(folder, rows)],
	[
		"a JSON array in zstd",
		(folder, rows) => file("rows.json.zst", zstd(Buffer.from(asArray(rows))), inArray)(folder, rows),
	],
	[
		"JSON objects, a file each",
		(folder, rows) => {
			const paths = rows.map((row, i) => {
				const path = join(folder, `row-${i}.json`);
				writeFileSync(path, `\n${row.replace(",", ",\n")}\n`);
				return path;
			});
			return { train_file: paths, location: (index) => `${paths[index]}:2 (row 1)` };
		},
	],
	["CSV", (folder, rows) => file("rows.csv", table(rows, ","), belowHeader)(folder, rows)],
	["CSV in gzip", (folder, rows) => file("rows.csv.gz", gzipSync(table(rows, ",")), belowHeader)(folder, rows)],
	["TSV", (folder, rows) => file("rows.tsv", table(rows, "\t"), belowHeader)(folder, rows)],
	["Parquet", parquet("codec uncompressed")],
	["Parquet in zstd", parquet("codec zstd")],
	["a folder", halves((folder) => folder)],
	["a pattern", halves((folder) => join(folder, "*.jsonl"))],
	[
		"a list of code",
		(_, rows) => ({ dataset: rows.map((row) => JSON.parse(row)), location: (index) => `train_dataset[${index}]` }),
	],
	[
		"a stream of code",
		(_, rows) => ({
			dataset: streamed(rows.map((row) => JSON.parse(row))) as Dataset<unknown>,
			location: (index) => `train_dataset[${index}]`,
		}),
	],
];

/** Rows of one kind in a folder of their own. */
export function give(parent: string, make: Make, rows: readonly string[]): Given | Promise<Given> {
	return make(mkdtempSync(join(parent, "kind-")), rows);
}
