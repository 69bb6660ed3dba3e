import { mkdirSync, writeFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { afterEach, describe, expect, it } from "vitest";
import { glob } from "../src/data/sources/glob.js";
import { openFiles } from "../src/data/sources/open.js";
import { Scratch } from "../src/data/sources/scratch.js";
import type { Source } from "../src/data/sources/source.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";

const folder = temporaryFolder();
const native = fakeNative();
let files = 0;

function write(content: string | Uint8Array, name = `rows-${files++}.jsonl`): string {
	const path = join(folder, name);
	writeFileSync(path, content);
	return path;
}

const opened: Source[] = [];
afterEach(async () => {
	for (const source of opened.splice(0)) await source.close();
});

async function open(...entries: string[]): Promise<Source> {
	const { source } = await openFiles(native, entries);
	opened.push(source);
	return source;
}

async function texts(source: Source, indexes = Array.from({ length: source.length }, (_, i) => i)): Promise<string[]> {
	return (await source.read(indexes)).map((row) => Buffer.from(row).toString("utf8"));
}

describe("JSONL files", () => {
	it("gives each line's bytes as they stand, at random, and says where they are", async () => {
		const path = write('{"a": 1.0}\n{"ä": "b"}\n{"c":2}');
		const source = await open(path);
		expect(source.length).toBe(3);
		expect(await texts(source, [2, 0, 1, 0])).toEqual(['{"c":2}', '{"a": 1.0}', '{"ä": "b"}', '{"a": 1.0}']);
		expect(source.location(2)).toBe(`${path}:3`);
		expect(source.bytes(0)).toBe(10);
	});

	it("leaves out carriage returns, a byte order mark and blank lines, and keeps the line numbers", async () => {
		const path = write('\uFEFF{"a":1}\r\n\r\n  \t\n{"b":2}\r\n\n');
		const source = await open(path);
		expect(await texts(source)).toEqual(['{"a":1}', '{"b":2}']);
		expect(source.blankLines).toBe(3);
		expect([0, 1].map((row) => source.location(row))).toEqual([`${path}:1`, `${path}:4`]);
	});

	it("finds lines that cross the bounds of reads", async () => {
		const long = `{"long":"${"x".repeat(5 * 1024 * 1024)}"}`;
		const lines = [long, '{"a":1}', " ".repeat(4 * 1024 * 1024), long, '{"b":2}'];
		const source = await open(write(`${lines.join("\r\n")}\r\n`));
		expect(source.length).toBe(4);
		expect(await texts(source)).toEqual([long, '{"a":1}', long, '{"b":2}']);
		expect(source.blankLines).toBe(1);
	});

	it("is known by its content: another name is the same, another byte is not", async () => {
		const [a, b, c] = await Promise.all([open(write("{}\n{}\n")), open(write("{}\n{}\n")), open(write("{}\n{ }\n"))]);
		expect(a?.identity).toBe(b?.identity);
		expect(a?.identity).not.toBe(c?.identity);
	});

	it("unpacks a compressed file by its content, names it as the user does, and leaves nothing behind", async () => {
		const path = write(gzipSync('{"a":1}\n{"b":2}\n'), "packed.jsonl");
		const parent = join(folder, "scratch");
		const scratch = new Scratch(native, parent);
		const { source } = await openFiles(native, [path], { scratch });
		opened.push(source);
		expect(await readdir(scratch.path())).toEqual(["lock"]);
		scratch.close();
		expect(await readdir(parent)).toEqual([]);
		expect(await texts(source)).toEqual(['{"a":1}', '{"b":2}']);
		expect(source.location(1)).toBe(`${path}:2`);
	});
});

describe("JSON files", () => {
	it("gives the elements of an array as they stand, with their line", async () => {
		const path = write('[\n  {"a": 1.0},\n  {"b":\n 2}\n]\n', "array.json");
		const source = await open(path);
		expect(await texts(source)).toEqual(['{"a": 1.0}', '{"b":\n 2}']);
		expect(source.location(1)).toBe(`${path}:3 (row 2)`);
	});

	it("takes a single object as a row, and JSONL by the name of JSON as rows", async () => {
		const single = await open(write('{\n "a": 1\n}\n', "single.json"));
		expect(await texts(single)).toEqual(['{\n "a": 1\n}\n']);
		const rows = await open(write('{"a":1}\n{"b":2}\n', "rows.json"));
		expect(rows.length).toBe(2);
	});

	it("refuses an empty array", async () => {
		const error = await errorOf(open(write("[ ]", "none.json")));
		expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		expect(error.message).toContain("none.json:1");
	});
});

describe("several files", () => {
	it("reads a pattern's files in the order of their names, and counts rows by entry", async () => {
		mkdirSync(join(folder, "many", "deep"), { recursive: true });
		write('{"f":2}\n', "many/b.jsonl");
		write('{"f":1}\n{"f":1.5}\n', "many/a.jsonl");
		write('{"f":3}\n', "many/deep/c.jsonl");
		write("not rows", "many/.hidden.jsonl");
		const many = await openFiles(native, [join(folder, "many/*.jsonl"), join(folder, "many/**/[c]?jsonl")]);
		opened.push(many.source);
		expect(many.entryRows).toEqual([3, 1]);
		expect(await texts(many.source, [3, 2, 0])).toEqual(['{"f":3}', '{"f":2}', '{"f":1}']);
		expect(many.source.location(2)).toBe(`${join(folder, "many/b.jsonl")}:1`);
		expect(await glob(join(folder, "many/**"))).toHaveLength(3);
	});
});

describe("files that cannot be used", () => {
	const cases: [string, () => string, RegExp, RegExp][] = [
		["a missing file", () => `${write("{}", "train.jsonl").slice(0, -2)}`, /no such file/, /train\.jsonl/],
		["a missing folder", () => join(folder, "nowhere/rows.jsonl"), /no such file/, /nowhere does not exist/],
		["a pattern without files", () => join(folder, "*.rows"), /no file matches/, /./],
		["an empty file", () => write("", "empty.jsonl"), /empty\.jsonl.*empty/, /./],
		["a file of blank lines", () => write("\n \n", "blank.jsonl"), /blank\.jsonl:1.*2 blank lines/, /./],
		["a folder with rows in several", () => join(folder, "many"), /2 of its folders/, /\*\.jsonl/],
		["UTF-16", () => write(Buffer.from('\uFEFF{"a":1}\n', "utf16le"), "wide.jsonl"), /wide\.jsonl:1.*UTF-16/, /iconv/],
		["UTF-16 without a mark", () => write(Buffer.from(`{"a":"${"b".repeat(50)}"}`, "utf16le")), /UTF-16/, /iconv/],
		["a zip archive", () => write("PK\x03\x04....", "rows.zip"), /rows\.zip: a zip archive/, /Unpack/],
		["an Arrow file", () => write("ARROW1..", "rows.arrow"), /rows\.arrow: an Arrow file/, /Parquet/],
		["Parquet that is cut off", () => write("PAR1....PAR", "rows.parquet"), /rows\.parquet: .*Parquet/, /damaged/],
	];
	it.each(cases)("%s: says what, where and what to do", async (_, path, message, hint) => {
		const error = await errorOf(open(path()));
		expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		expect(error.message).toMatch(message);
		expect(error.hint).toMatch(hint);
	});

	it("notices a file that becomes shorter", async () => {
		const path = write(`${JSON.stringify({ a: "x".repeat(100) })}\n`.repeat(10));
		const source = await open(path);
		writeFileSync(path, "{}\n");
		const error = await errorOf(source.read([9]));
		expect(error.code).toBe("ARL_DATA");
		expect(error.message).toContain("became shorter");
	});
});
