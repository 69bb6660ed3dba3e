import { readFileSync, truncateSync, writeFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { Scratch } from "../src/data/sources/scratch.js";
import { ArlError } from "../src/errors.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { fc, holdsAsync } from "./support/properties.js";
import { duck, duckParquet, readRows } from "./support/tables.js";

const folder = temporaryFolder();
let files = 0;
const file = () => join(folder, `rows-${files++}.parquet`);

/** The rows of a query, by way of a Parquet file. */
async function rowsOf(query: string, options = ""): Promise<string[]> {
	return (await readRows([await duckParquet(file(), query, options)])).rows;
}

describe("values of Parquet columns", () => {
	const scalars: [string, string, string][] = [
		["integers beyond 2^53", "9223372036854775807::bigint", "9223372036854775807"],
		["the smallest integer", "(-9223372036854775807 - 1)::bigint", "-9223372036854775808"],
		["unsigned integers of 64 bits", "18446744073709551615::ubigint", "18446744073709551615"],
		["unsigned integers of 32 bits", "4294967295::uinteger", "4294967295"],
		["unsigned integers of 16 bits", "65535::usmallint", "65535"],
		["small integers", "-7::tinyint", "-7"],
		["floats that are whole numbers", "1::double", "1.0"],
		["small floats", "1e-7::double", "1e-7"],
		["negative zero", "'-0.0'::double", "-0.0"],
		["floats of 32 bits, exactly", "0.1::float", "0.10000000149011612"],
		["decimals, each digit", "'12345678901234567890.123456789'::decimal(38,9)", "12345678901234567890.123456789"],
		["negative decimals", "'-0.05'::decimal(9,2)", "-0.05"],
		["decimals of 64 bits", "'1234567890.10'::decimal(18,2)", "1234567890.10"],
		["booleans", "true", "true"],
		["dates", "date '1969-12-31'", '"1969-12-31"'],
		["times", "time '23:59:01.5'", '"23:59:01.500000"'],
		["timestamps", "timestamp '1969-12-31 23:59:59.25'", '"1969-12-31T23:59:59.250000"'],
		["timestamps of nanoseconds", "'2024-02-29 01:02:03.123456789'::timestamp_ns", '"2024-02-29T01:02:03.123456789"'],
		["timestamps with a zone, in UTC", "timestamptz '2024-02-29 12:00:00+02'", '"2024-02-29T10:00:00.000000Z"'],
		["UUIDs", "'00112233-4455-6677-8899-aabbccddeeff'::uuid", '"00112233-4455-6677-8899-aabbccddeeff"'],
		["enums", "'b'::enum('a', 'b')", '"b"'],
		["text with all that JSON escapes", "'\"' || chr(92) || chr(10) || chr(1) || 'ä€😀'", '"\\"\\\\\\n\\u0001ä€😀"'],
		["null", "null::varchar", "null"],
		["lists", "[[1, null], [], null]", "[[1,null],[],null]"],
		["empty lists", "[]::integer[]", "[]"],
		["maps in the order of their entries", "map([10, 9], ['x', null])", '{"10":"x","9":null}'],
		["maps of texts", "map(['ä\"'], [[1.5::double]])", '{"ä\\"":[1.5]}'],
		["structs", "{'b': 1, 'a': {'c': [{'d': 2::double}]}}", '{"b":1,"a":{"c":[{"d":2.0}]}}'],
		["JSON columns, as they stand", `'{"a":1.0, "b":[1e2]}'::json`, '{"a":1.0, "b":[1e2]}'],
	];
	it.each(scalars)("%s", async (_, sql, text) => {
		expect(await rowsOf(`select ${sql} as v`)).toEqual([`{"v":${text}}`]);
		expect(await rowsOf(`select ${sql} as v`, "parquet_version v2")).toEqual([`{"v":${text}}`]);
	});

	it("writes what JSON has no number for as Python does, for the row's parser to refuse", async () => {
		const path = await duckParquet(file(), "select unnest(['nan', 'inf', '-inf', '1'])::double as v");
		const { rows, notices } = await readRows([path]);
		expect(rows).toEqual(['{"v":NaN}', '{"v":Infinity}', '{"v":-Infinity}', '{"v":1.0}']);
		expect(notices).toEqual(["rows with NaN or infinity, for which JSON has no number, cannot be used: 3 in v"]);
	});

	it("gives bytes of images as data URLs, bytes of text as text, other bytes as base64", async () => {
		const png = "\\x89PNG\\x0D\\x0A\\x1A\\x0Apixels";
		const jpeg = "\\xFF\\xD8\\xFF\\xE0";
		const rows = await rowsOf(
			`select unnest(['${png}'::blob, '${jpeg}'::blob, 'plain'::blob, '\\x00\\x01'::blob, '\\xFF\\x01'::blob]) as v`,
		);
		const url = (type: string, bytes: string) =>
			`{"v":"data:${type};base64,${Buffer.from(bytes, "latin1").toString("base64")}"}`;
		expect(rows).toEqual([
			url("image/png", "\x89PNG\r\n\x1a\npixels"),
			url("image/jpeg", "\xff\xd8\xff\xe0"),
			'{"v":"plain"}',
			url("application/octet-stream", "\x00\x01"),
			url("application/octet-stream", "\xff\x01"),
		]);
	});

	it("gives bytes in columns of images as data URLs too, and text there as the list that it is", async () => {
		const bytes = "select '\\xFF\\xD8\\xFF'::blob as images";
		expect(await rowsOf(bytes)).toEqual(['{"images":"data:image/jpeg;base64,/9j/"}']);
		const texts = `select unnest(['["a.png"]', 'b.png', '']) as images`;
		expect(await rowsOf(texts)).toEqual(['{"images":["a.png"]}', '{"images":"b.png"}', '{"images":null}']);
	});

	it("gives an image of Hugging Face's datasets as one text: its bytes, else its path", async () => {
		const rows = await rowsOf(
			"select unnest([{'bytes': '\\xFF\\xD8\\xFF'::blob, 'path': 'a.jpg'}, {'bytes': null, 'path': 'b.jpg'}, null, {'bytes': null, 'path': null}]) as image",
		);
		expect(rows).toEqual([
			'{"image":"data:image/jpeg;base64,/9j/"}',
			'{"image":"b.jpg"}',
			'{"image":null}',
			'{"image":null}',
		]);
	});
});

describe("null and absent in Parquet", () => {
	it("keeps null in columns, lists and maps, and leaves out keys that are null in structs", async () => {
		const path = await duckParquet(
			file(),
			"select unnest([{'a': 1, 'b': null, 'c': {'d': null::int}}, {'a': null, 'b': [null, {'e': 'x', 'f': null}], 'c': null}]) as s, null::int as n",
		);
		const { rows, notices } = await readRows([path]);
		expect(rows).toEqual(['{"s":{"a":1,"c":{}},"n":null}', '{"s":{"b":[null,{"e":"x"}]},"n":null}']);
		expect(notices).toEqual(["nulls inside of Parquet structs are read as absent keys: 5 in s"]);
	});

	it("reads maps by message index that became structs", async () => {
		const rows = await rowsOf(
			"select unnest([{'1': 0.5::double, '3': null}, {'1': null, '3': 1::double}]) as advantages",
		);
		expect(rows).toEqual(['{"advantages":{"1":0.5}}', '{"advantages":{"3":1.0}}']);
	});

	it("gives each tool only the parameters that it has, and a message its content even where that is null", async () => {
		const rows = [
			'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\\"x\\":1.0}"}}]}],"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"x":{"type":"number"}}}}}]}',
			'{"messages":[{"role":"user","content":"b"},{"role":"assistant","content":"c"}],"tools":[{"type":"function","function":{"name":"g","parameters":{"type":"object","properties":{"y":{"type":"string","enum":["u","v"]}}}}},{"type":"function","function":{"name":"h","parameters":{"type":"object","properties":{}}}}]}',
		];
		const jsonl = join(folder, "tools.jsonl");
		writeFileSync(jsonl, rows.join("\n"));
		const path = await duckParquet(file(), `select * from read_json('${jsonl}', format = 'newline_delimited')`);
		expect((await readRows([path])).rows).toEqual(rows);
	});
});

describe("JSON text in Parquet columns", () => {
	it("is put in as it is where a list or an object belongs, so that 1.0 stays 1.0", async () => {
		const messages = '[ {"role": "assistant", "content": "x", "weight": 1.0} ]';
		const rows = await rowsOf(
			`select '${messages}' as messages, '[{"n":1.50}]' as tools, '{"0":1e0}' as advantages, '[1, 2]' as prompt`,
		);
		expect(rows).toEqual([`{"messages":${messages},"tools":[{"n":1.50}],"advantages":{"0":1e0},"prompt":"[1, 2]"}`]);
	});

	it("may be the items of a list, may hold line breaks, and is null where it is blank", async () => {
		const rows = await rowsOf(
			`select ['{"type":\n"function"}'] as tools, ' ' as advantages, 'null' as scores, [' {"role":"user"}'] as messages`,
		);
		expect(rows).toEqual([
			'{"tools":[{"type":\n"function"}],"advantages":null,"scores":null,"messages":[ {"role":"user"}]}',
		]);
	});

	it("is recognized by the names that `columns` gives", async () => {
		const path = await duckParquet(file(), `select '[]' as chat, '[]' as messages`);
		const { rows } = await readRows([path], { columns: { messages: "chat" } });
		expect(rows).toEqual(['{"chat":[],"messages":"[]"}']);
	});

	it("cannot reach out of its place", async () => {
		const rows = await rowsOf(`select unnest(['[], "x": [1]', '[1', '{"a":1}}', '["\n"]', '] [']) as tools`);
		expect(rows.map((row) => typeof JSON.parse(row).tools)).toEqual(Array(5).fill("string"));
	});
});

describe("Parquet files", () => {
	const query = (rows: number) =>
		`select {'n': i, 'list': [x for x in range(i % 5)], 'text': repeat(chr(97 + (i % 26)::int), (i % 70)::int)} as s, i::double as f, case when i % 3 = 0 then null else 'v' || (i % 7) end as v from range(${rows}) t(i)`;
	const expected = (i: number) => {
		const list = JSON.stringify(Array.from({ length: i % 5 }, (_, x) => x));
		const text = String.fromCharCode(97 + (i % 26)).repeat(i % 70);
		return `{"s":{"n":${i},"list":${list},"text":"${text}"},"f":${i}.0,"v":${i % 3 === 0 ? "null" : `"v${i % 7}"`}}`;
	};
	const rows = Array.from({ length: 9000 }, (_, i) => expected(i));

	const written = ["uncompressed", "snappy", "gzip", "zstd", "brotli", "lz4_raw"].flatMap((codec) =>
		["v1", "v2"].map((version) => [codec, version] as const),
	);
	it.each(written)("packed with %s, version %s, give the same rows", async (codec, version) => {
		const options = `codec ${codec}, parquet_version ${version}, row_group_size 2048`;
		const read = await readRows([await duckParquet(file(), query(9000), options)]);
		expect(read.rows).toEqual(rows);
	});

	it("give the same rows from many row groups and from one, and are known by their content", async () => {
		const path = await duckParquet(file(), query(9000), "row_group_size 100000");
		const many = await readRows([path]);
		const one = await readRows([await duckParquet(file(), query(9000), "row_group_size 2048")]);
		expect(many.rows).toEqual(rows);
		expect(one.identity).toBe(many.identity);
		expect(many.places[17]).toBe(`${path}[17]`);
		expect((await readRows([await duckParquet(file(), query(8999))])).identity).not.toBe(one.identity);
	});

	it("are known by their content and may be compressed once more; nothing is left behind", async () => {
		const path = await duckParquet(file(), query(9000));
		const other = join(folder, "rows.bin");
		writeFileSync(other, gzipSync(readFileSync(path)));
		const parent = join(folder, "scratch");
		const scratch = new Scratch(fakeNative(), parent);
		const read = await readRows([other], { scratch });
		expect(read.rows).toEqual(rows);
		expect(read.places[8999]).toBe(`${other}[8999]`);
		expect(await readdir(scratch.path())).toEqual(["lock"]);
		scratch.close();
		expect(await readdir(parent)).toEqual([]);
	});
});

describe("reading a table", () => {
	it("ends when it is interrupted", async () => {
		const path = await duckParquet(file(), "select repeat('x', 1000) as text from range(9000)");
		const error = await errorOf(readRows([path], { signal: AbortSignal.abort() }));
		expect(error).toMatchObject({ code: "ARL_INTERRUPTED", exitCode: 130 });
	});

	it("tells that a split chooses nothing where no folder is given", async () => {
		const path = await duckParquet(file(), "select 1 as a");
		expect((await readRows([path], { split: "test" })).notices).toEqual([
			expect.stringContaining("split test chooses nothing"),
		]);
	});
});

describe("Parquet files that cannot be used", () => {
	const whole = async () =>
		duckParquet(file(), "select i, 'text ' || i as t, [i, i + 1] as l from range(5000) t(i)", "codec snappy");

	it("names a file that was cut off, and one that is none", async () => {
		const path = await whole();
		truncateSync(path, 9000);
		const cut = await errorOf(readRows([path]));
		expect(cut).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		expect(cut.message).toMatch(/rows-\d+\.parquet: .*no end mark/);
		const none = join(folder, "none.parquet");
		writeFileSync(none, "hello\n");
		expect((await errorOf(readRows([none]))).message).toContain("not a Parquet file");
		writeFileSync(none, "PAR1");
		expect((await errorOf(readRows([none]))).message).toContain("ends early");
		writeFileSync(none, "version https://git-lfs.github.com/spec/v1\noid sha256:00\n");
		expect((await errorOf(readRows([none]))).hint).toContain("git lfs pull");
	});

	it("names an empty file, and an encrypted one", async () => {
		const empty = await errorOf(readRows([await duckParquet(file(), "select 1 as a where false")]));
		expect(empty.message).toContain("no rows");
		const path = file();
		await duck(
			"set force_mbedtls_unsafe = true",
			"pragma add_parquet_key('key', '0123456789112345')",
			`copy (select 1 as a) to '${path}' (format parquet, encryption_config {footer_key: 'key'})`,
		);
		const error = await errorOf(readRows([path]));
		expect(error.message).toMatch(/rows-\d+\.parquet: the Parquet file is encrypted/);
	});

	it("names the column and the page that is damaged", async () => {
		const path = await whole();
		const bytes = readFileSync(path);
		bytes.fill(0xff, 40, 60);
		writeFileSync(path, bytes);
		const error = await errorOf(readRows([path]));
		expect(error.code).toBe("ARL_DATA");
		expect(error.message).toMatch(/rows-\d+\.parquet: column i cannot be read \(row group 0, page at byte 4, SNAPPY\)/);
	});

	it("ends in a named error or in rows, whatever bytes are damaged", async () => {
		const path = await duckParquet(
			file(),
			"select i, 'text ' || (i % 9) as t, [{'a': i, 'b': 'x'}] as l from range(300) t(i)",
			"codec zstd",
		);
		const bytes = readFileSync(path);
		const change = fc.tuple(fc.integer({ min: 4, max: bytes.length - 5 }), fc.nat(255));
		let refused = 0;
		const readable = async (changes: [number, number][]) => {
			const changed = Buffer.from(bytes);
			for (const [at, byte] of changes) changed[at] = byte;
			writeFileSync(path, changed);
			const error: unknown = await readRows([path]).then(
				() => null,
				(thrown: unknown) => thrown,
			);
			if (error === null) return;
			expect(error).toBeInstanceOf(ArlError);
			expect((error as ArlError).code).toBe("ARL_DATA");
			expect((error as ArlError).message).toContain(path);
			refused += 1;
		};
		await holdsAsync(300, fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 4 }), readable));
		expect(refused).toBeGreaterThan(100);
	}, 60_000);
});
