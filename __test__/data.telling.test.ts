import { mkdirSync, mkdtempSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { explainRow } from "../src/data/sources/explain.js";
import { glob } from "../src/data/sources/glob.js";
import { openFiles } from "../src/data/sources/open.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, root, sharedPath } from "./support/real.js";
import { readRows } from "./support/tables.js";

const folder = temporaryFolder();
const model = join(root, "assets", "model");

function write(text: string | Uint8Array, name: string): string {
	const path = join(mkdtempSync(join(folder, "file-")), name);
	writeFileSync(path, text);
	return path;
}

const open = (path: string) => errorOf(openFiles(fakeNative(), [path]));

describe("a refused row names its cause", () => {
	const cases: [string, string, string, RegExp][] = [
		[
			"a list of Python in a column",
			`{"messages":[{'role': 'user'}]}`,
			"not JSON: no key at byte 14",
			/^`messages` is Python's text of a list, not JSON: write it with json\.dumps \(\[\{'role': 'user'\}\]\)$/,
		],
		[
			"a dict of Python in a text",
			`{"tools":"{'name': \\"it's\\"}"}`,
			"`tools` is a string, not an array",
			/^`tools` is Python's text of a dict/,
		],
		[
			"words of Python",
			`{"a":1,"tools":[{"x": None}]}`,
			"not JSON: no value at byte 20",
			/^`tools` is Python's text of a list/,
		],
		[
			"a whole row of Python",
			`{'messages': [{'role': 'user'}]}`,
			"not JSON: no key at byte 1",
			/^the row is Python's text of a dict/,
		],
		[
			"an array of numpy",
			`{"messages":"array([{'role': 'user'}])"}`,
			"`messages` is a string, not an array",
			/^`messages` is Python's text/,
		],
		[
			"not a number",
			`{"messages":[],"reward":NaN}`,
			"not JSON: no value at byte 24",
			/^`reward` contains NaN or Infinity/,
		],
		[
			"not a number in a list",
			`{"scores":{"1": NaN}}`,
			"not JSON: no value at byte 16",
			/^`scores` contains NaN or Infinity.*write null/,
		],
		[
			"another fault in a column",
			`{"messages":[{"role" "user"}]}`,
			"not JSON: no `:` at byte 21",
			/^`messages`: not JSON: no `:` at byte 21$/,
		],
		[
			"broken JSON in a text",
			`{"messages":"[{\\"role\\": }]"}`,
			"`messages` is a string, not an array",
			/^`messages` contains text that is not JSON/,
		],
		[
			"a table by column",
			`{"prompt":{"0":"a","1":"b"},"completion":{"0":"c","1":"d"}}`,
			"`prompt` is an object, not an array",
			/column by column \(prompt, completion\).*orient="records"/,
		],
		[
			"rows under a key",
			`{"version":1,"data":[{"prompt":"a","completion":"b"}]}`,
			"no known shape: the keys version, data",
			/rows are the one item of its key `data`/,
		],
	];
	it.each(cases)("%s", (_, row, message, expected) => {
		expect(explainRow(Buffer.from(row), message)).toMatch(expected);
	});

	const unknown: [string, string, string][] = [
		["a text that is meant to be one", `{"messages":"hello"}`, "`messages` is a string, not an array"],
		[
			"text of another key than the one at fault",
			`{"note":"[{'a': 1}]","messages":"x"}`,
			"`messages` is a string, not an array",
		],
		["quotes in good JSON", `{"messages":[{"role":"user","content":"['a', None]"}]}`, "no messages: the list is empty"],
		["turns under a key", `{"dialog":[{"role":"user","text":"a"}]}`, "no known shape: the keys dialog"],
		["a cut-off row", `{"messages":[{"role":"us`, "not JSON: a string does not end"],
	];
	it.each(unknown)("and says nothing of its own about %s", (_, row, message) => {
		expect(explainRow(Buffer.from(row), message)).toBeNull();
	});

	it("also in a table, on the command line", { timeout: 30_000 }, async () => {
		const path =
			sharedPath("cases/telling-messages/python.csv", "a Python list in CSV, the case") ??
			write(`messages\n"[{'role': 'user', 'content': 'hi'}]"\n`, "python.csv");
		const { code, stderr } = await arl(["inspect", "--model_name_or_path", model, "--train_file", path]);
		expect(code).toBe(3);
		expect(stderr).toContain(`${path}:2: \`messages\` is Python's text of a list, not JSON: write it with json.dumps`);
	});
});

describe("a column without a name", () => {
	it("that holds numbers, as pandas' index does, is left out and reported", async () => {
		const path = write(",instruction,output\n0,Say hi,Hi.\n7,Stop,\n", "index.csv");
		const { rows, notices } = await readRows([path]);
		expect(rows).toEqual(['{"instruction":"Say hi","output":"Hi."}', '{"instruction":"Stop","output":""}']);
		expect(notices).toEqual([
			`${path}: column 1 has no name and contains numbers, like the index that pandas writes; it is left out (to_csv(path, index=False) writes none)`,
		]);
	});

	it("that is empty, as spreadsheets leave it behind, is left out and reported", async () => {
		const path = write("prompt;completion;;\na;b;;\n", "sheet.csv");
		const { rows, notices } = await readRows([path]);
		expect(rows).toEqual(['{"prompt":"a","completion":"b"}']);
		expect(notices).toHaveLength(2);
	});

	it.each([
		[",prompt\n0,a\nrow,b\n", ':1: the header: column 1 has no name, and contains "row" on line 3'],
		["prompt,\na,1\n", ':1: the header: column 2 has no name, and contains "1" on line 2'],
		[",,\n1,2,3\n", ":1: the header names no column"],
	])("that says something is refused with the line: %j", async (text, message) => {
		const path = write(text, "rows.csv");
		const error = await open(path);
		expect(error.message).toBe(`${path}${message}`);
		expect(error.hint).toContain("index=False");
	});
});

describe("a file that holds no rows is named for what it is", () => {
	const cases: [string, string | Uint8Array, RegExp, RegExp][] = [
		["notes.txt", "Once upon a time\n", /notes\.txt:1: plain text, not rows/, /\{"text": "\.\.\."\}.*json\.dumps/],
		["notes.txt.gz", gzipSync("Once upon a time\n"), /notes\.txt\.gz:1: plain text/, /\.jsonl/],
		["README.md", "# Rows\n", /README\.md:1: plain text/, /\.jsonl/],
		["rows.jsonl", "<!DOCTYPE html>\n<html>", /rows\.jsonl:1: a page of HTML or XML/, /fetch the file itself/],
		["rows.xlsx", "PK\x03\x04....", /rows\.xlsx: a workbook/, /Save the sheet as CSV/],
		[
			"rows.tar.gz",
			gzipSync(Buffer.concat([Buffer.alloc(257, "a"), Buffer.from("ustar\x0000")])),
			/rows\.tar\.gz: a tar archive/,
			/Unpack it/,
		],
		["rows.pkl", Buffer.from([0x80, 4, 0x95, 1, 2, 3]), /rows\.pkl: a Python pickle/, /json\.dumps/],
	];
	it.each(cases)("%s", async (name, text, message, hint) => {
		const error = await open(write(text, name));
		expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		expect(error.message).toMatch(message);
		expect(error.hint).toMatch(hint);
	});

	it("and a .txt that holds JSON lines or an array is read as it is", async () => {
		expect((await readRows([write('{"text":"a"}\n', "rows.txt")])).rows).toEqual(['{"text":"a"}']);
		expect((await readRows([write('[{"text":"a"}]', "rows.txt")])).rows).toEqual(['{"text":"a"}']);
	});
});

describe("patterns", () => {
	it.each(["rows[z-a].jsonl", "[b-a]/rows.jsonl", "x/*/r[9-0]*.jsonl"])(
		"that cannot be read are errors that name them: %s",
		async (pattern) => {
			mkdirSync(join(folder, "x", "y"), { recursive: true });
			const full = join(folder, pattern);
			const error = await open(full);
			expect(error).toMatchObject({ code: "ARL_CONFIG" });
			expect(error.message).toContain(`${full}: invalid pattern`);
			expect(error.hint).toContain("[a-z]");
		},
	);

	it("take a link to a folder for a folder, and report one that leads nowhere", async () => {
		const place = mkdtempSync(join(folder, "links-"));
		mkdirSync(join(place, "real"));
		writeFileSync(join(place, "real", "a.jsonl"), '{"text":"a"}\n');
		symlinkSync(join(place, "real"), join(place, "linked.jsonl"));
		symlinkSync(join(place, "real", "a.jsonl"), join(place, "b.jsonl"));
		expect(await glob(join(place, "*.jsonl"))).toEqual([join(place, "b.jsonl")]);
		expect(await glob(join(place, "*", "*.jsonl"))).toEqual([
			join(place, "linked.jsonl", "a.jsonl"),
			join(place, "real", "a.jsonl"),
		]);
		symlinkSync(join(place, "gone"), join(place, "c.jsonl"));
		expect((await open(join(place, "*.jsonl"))).message).toContain("c.jsonl");
	});

	it("and folders follow links to folders once, also where they lead in a circle", async () => {
		const place = mkdtempSync(join(folder, "circle-"));
		mkdirSync(join(place, "elsewhere"));
		mkdirSync(join(place, "rows"));
		writeFileSync(join(place, "elsewhere", "train.jsonl"), '{"text":"a"}\n');
		symlinkSync(join(place, "elsewhere"), join(place, "rows", "data"));
		symlinkSync(join(place, "rows"), join(place, "rows", "again"));
		expect((await readRows([join(place, "rows")])).places).toEqual([`${join(place, "rows", "data", "train.jsonl")}:1`]);
	});
});
