import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { duck, readRows } from "./support/tables.js";

const folder = temporaryFolder();
let files = 0;

function write(content: string | Uint8Array, name = `rows-${files++}.csv`): string {
	const path = join(folder, name);
	writeFileSync(path, content);
	return path;
}

const read = (content: string | Uint8Array, name?: string) => readRows([write(content, name)]);

describe("CSV files", () => {
	it("give a row for each line below the header, whatever quotes, line breaks and marks there are", async () => {
		const path = write('\uFEFFprompt,completion\r\n"a ""q"" b","x\r\n,y"\r\n\r\n\r\n ä ,\r\n"",z');
		const { rows, places } = await readRows([path]);
		expect(rows).toEqual([
			'{"prompt":"a \\"q\\" b","completion":"x\\r\\n,y"}',
			'{"prompt":" ä ","completion":""}',
			'{"prompt":"","completion":"z"}',
		]);
		expect(places).toEqual([2, 6, 7].map((line) => `${path}:${line}`));
	});

	it("keep text as text, and put JSON in as it is where lists and objects belong", async () => {
		const { rows } = await read(
			'messages,tools,prompt,advantages,reward,step,record_id\n"[{""weight"": 1.0}]",,1.0,"{""1"":2.50}",0.10,7,007\n[],null,[1],,,x,\n',
		);
		expect(rows).toEqual([
			'{"messages":[{"weight": 1.0}],"tools":null,"prompt":"1.0","advantages":{"1":2.50},"reward":0.10,"step":7,"record_id":"007"}',
			'{"messages":[],"tools":null,"prompt":"[1]","advantages":null,"reward":null,"step":"x","record_id":""}',
		]);
	});

	it("are recognized by the ending or by a header of known names, and separated by what the header has most of", async () => {
		const expected = ['{"prompt":"a,b","completion":"c"}'];
		expect((await read("prompt\tcompletion\na,b\tc\n", "a.tsv")).rows).toEqual(expected);
		expect((await read("prompt;completion\na,b;c\n", "b.csv")).rows).toEqual(expected);
		expect((await read('"prompt","completion"\n"a,b",c\n', "c.txt")).rows).toEqual(expected);
		expect((await read(gzipSync('prompt,completion\n"a,b",c\n'), "d.csv.gz")).rows).toEqual(expected);
		expect((await read('{"prompt":"a,b","completion":"c"}\n', "e.csv")).rows).toEqual(expected);
		expect((await read('other,names\n"a,b",c\n', "f.csv")).rows).toEqual(['{"other":"a,b","names":"c"}']);
	});

	it("take the names that `columns` gives", async () => {
		const path = write('chat,messages\n"[1.0]",[2]\n');
		expect((await readRows([path], { columns: { messages: "chat" } })).rows).toEqual([
			'{"chat":[1.0],"messages":"[2]"}',
		]);
	});

	it("keep the lines of rows that lie beyond the parser's chunks", async () => {
		const lines = Array.from({ length: 40_000 }, (_, i) => `"row ${i}\n${"x".repeat(40)}",${i}`);
		const path = write(`prompt,completion\n${lines.join("\n")}\n`);
		const { rows, places } = await readRows([path]);
		expect(rows).toHaveLength(40_000);
		expect(JSON.parse(rows[39_999] ?? "")).toEqual({ prompt: `row 39999\n${"x".repeat(40)}`, completion: "39999" });
		expect(places[39_999]).toBe(`${path}:${2 + 2 * 39_999}`);
	});

	it("that DuckDB writes give what it was given", async () => {
		const path = join(folder, "duck.csv");
		const texts = ["plain", 'q"uo"te', "line\nbreak", "com,ma", " space ", "ä€😀", "\r\n"];
		const list = texts.map((text) => `'${text.replaceAll("'", "''")}'`).join(", ");
		await duck(`copy (select unnest([${list}]) as prompt, 'x' as completion) to '${path}' (format csv, header)`);
		expect((await readRows([path])).rows.map((row) => JSON.parse(row).prompt)).toEqual(texts);
	});

	it("keep bytes that are no UTF-8 for the row's parser to refuse", async () => {
		const path = write(Buffer.from("prompt,completion\na\xff,b\n", "latin1"));
		const { rows } = await readRows([path]);
		expect(rows[0]).toContain("\uFFFD");
	});
});

describe("CSV files that cannot be used", () => {
	const cases: [string, string, RegExp][] = [
		["too many fields", "prompt,completion\na,b\n\nc,d,e\n", /:4: 3 fields where the header has 2/],
		["too few fields", "prompt,completion\na\n", /:2: 1 fields where the header has 2/],
		["a quoted field without an end", 'prompt,completion\na,b\nc,"d\n\ne,f\n', /:3: a quoted field has no end/],
		["a stray quote", 'prompt,completion\na,b\nc,d"e\n', /:3: a quote inside a field/],
		["text behind a quote", 'prompt,completion\n"a"b,c\n', /:2: something follows the closing quote/],
		["a name twice", "prompt,prompt\na,b\n", /:1: the header: two columns are named prompt/],
		["a column without a name", "prompt,\na,b\n", /:1: the header: column 2 has no name/],
		["no rows", "prompt,completion\n", /a header and no rows/],
		["an empty file", "", /empty/],
	];
	it.each(cases)("%s: says what and where", async (_, content, message) => {
		const error = await errorOf(read(content));
		expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		expect(error.message).toMatch(message);
		expect(error.hint).not.toBe("");
	});
});
