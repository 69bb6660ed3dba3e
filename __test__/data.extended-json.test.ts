import { mkdtempSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { BSON } from "mongodb";
import { describe, expect, it } from "vitest";
import { openFiles } from "../src/data/sources/open.js";
import { strayExtendedJson } from "../src/data/sources/read-extended.js";
import { bsonText, documentOf } from "../src/mongo/bson-json.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";

const { Binary, BSONSymbol, Decimal128, Double, EJSON, Int32, Long, ObjectId, UUID } = BSON;
const folder = temporaryFolder();

function write(text: string, name = "rows.jsonl"): string {
	const path = join(mkdtempSync(join(folder, "file-")), name);
	writeFileSync(path, text);
	return path;
}

async function read(path: string): Promise<{ rows: string[]; places: string[]; notices: string[] }> {
	const { source, notices } = await openFiles(fakeNative(), [path]);
	try {
		const indexes = Array.from({ length: source.length }, (_, i) => i);
		const rows = (await source.read(indexes)).map((row) => Buffer.from(row).toString("utf8"));
		return { rows, places: indexes.map((row) => source.location(row)), notices };
	} finally {
		await source.close();
	}
}

const id = new ObjectId("65f0a1b2c3d4e5f6a7b8c9d0");
const chat = [
	{ role: "user", content: "hi" },
	{ role: "assistant", content: "hello", weight: new Double(1) },
];

/** Documents with every type that a row may hold, deep and shallow. */
const DOCUMENTS: Record<string, unknown>[] = [
	{ _id: id, messages: chat, reward: new Double(0.1), step: new Int32(-1), split: "train" },
	{
		_id: id,
		messages: chat,
		large: Long.fromString("9223372036854775807"),
		small: Long.fromString("-9007199254740993"),
	},
	{
		_id: id,
		at: new Date("2024-02-29T10:00:00.123Z"),
		old: new Date("1901-01-01T00:00:00Z"),
		price: Decimal128.fromString("1.500"),
	},
	{
		_id: id,
		bytes: new Binary(Buffer.from("abc")),
		uuid: new UUID("01234567-89ab-cdef-0123-456789abcdef"),
		symbol: new BSONSymbol("s"),
	},
	{ _id: id, zero: new Double(-0), tiny: new Double(5e-324), huge: new Double(1.5e300), nothing: null, yes: true },
	{
		_id: id,
		lists: [[new Int32(1)], [], {}, [{ a: [new Double(2.5), null, id] }]],
		"10": new Int32(1),
		"2": new Int32(2),
	},
	{
		_id: id,
		messages: chat,
		tools: [
			{
				type: "function",
				function: { name: "f", parameters: { $ref: "#/$defs/a", $defs: { a: { minimum: new Int32(0) } } } },
			},
		],
	},
];

/** What a run reads of the same documents in a database. */
const fromDatabase = DOCUMENTS.map((document) => bsonText(documentOf(BSON.serialize(document))));

describe("a file of Extended JSON", () => {
	it("in canonical form gives the text that the same documents have in a database, line by line", async () => {
		const path = write(DOCUMENTS.map((document) => `${EJSON.stringify(document, { relaxed: false })}\n\n`).join(""));
		const { rows, places, notices } = await read(path);
		expect(rows).toEqual(fromDatabase);
		expect(places).toEqual(DOCUMENTS.map((_, i) => `${path}:${2 * i + 1}`));
		expect(notices).toEqual([expect.stringContaining(`${path}: read as MongoDB's Extended JSON (canonical form)`)]);
	});

	it("as mongoexport --jsonArray --pretty writes it gives the same", async () => {
		const array = DOCUMENTS.map((document) =>
			JSON.stringify(JSON.parse(EJSON.stringify(document, { relaxed: false })), null, 1),
		);
		expect((await read(write(`[${array.join(",\n")}]`, "rows.json"))).rows).toEqual(fromDatabase);
	});

	it("in relaxed form gives the values too; what is a number stays as it is spelled", async () => {
		const text =
			'{"_id":{"$oid":"65F0A1B2C3D4E5F6A7B8C9D0"},"reward":1.0,"large":9223372036854775807,"at":{"$date":"2024-02-29T11:00:00+01:00"},"before":{"$date":{"$numberLong":"-62135596800000"}},"bytes":{"$binary":"YWJj","$type":"00"},"plain":{"$uuid":"01234567-89ab-cdef-0123-456789abcdef"},"pattern":{"$regularExpression":{"pattern":"a.*","options":"i"}},"stamp":{"$timestamp":{"t":1,"i":2}},"gone":{"$undefined":true}}\n';
		const { rows, notices } = await read(write(text));
		expect(rows).toEqual([
			'{"_id":"65f0a1b2c3d4e5f6a7b8c9d0","reward":1.0,"large":9223372036854775807,"at":"2024-02-29T10:00:00.000Z","before":"0001-01-01T00:00:00.000Z","bytes":"YWJj","plain":"ASNFZ4mrze8BI0VniavN7w==","pattern":"/a.*/i","stamp":{"t":1,"i":2}}',
		]);
		expect(notices).toEqual([expect.stringContaining("(relaxed form)")]);
	});

	it("without _id is known by its numbers, and one without numbers next to them is no contradiction", async () => {
		const rows = [
			'{"text":"a","reward":{"$numberInt":"3"}}',
			'{"text":"b"}',
			'{"text":"c","reward":{"$numberDouble":"3.0"}}',
		];
		expect((await read(write(`${rows.join("\n")}\n`))).rows).toEqual([
			'{"text":"a","reward":3}',
			'{"text":"b"}',
			'{"text":"c","reward":3.0}',
		]);
	});

	it("keeps rows that are no JSON as they are, to be refused with their place", async () => {
		const path = write(`${EJSON.stringify({ _id: id }, { relaxed: false })}\n{"a": {"$numberInt": "1"}\n`);
		expect((await read(path)).rows[1]).toBe('{"a": {"$numberInt": "1"}');
	});

	it("writes a number that is none as Python does, so that its row is refused", async () => {
		expect((await read(write('{"reward":{"$numberDouble":"NaN"},"step":{"$numberInt":"1"}}\n'))).rows).toEqual([
			'{"reward":NaN,"step":1}',
		]);
	});

	const contradictions: [string, string[], RegExp][] = [
		[
			"a later row with plain numbers",
			['{"reward":{"$numberInt":"3"}}', '{"text":"b","reward":3}'],
			/:2: reward is a plain number, and .*:1: reward one of/,
		],
		[
			"an earlier row with plain numbers",
			['{"meta":{"n":[3]}}', '{"reward":{"$numberDouble":"3.5"}}'],
			/:1: meta\.n\[0\] is a plain number, and .*:2: reward one of/,
		],
		["both in one row", ['{"reward":{"$numberInt":"3"},"step":1}'], /:1: step is a plain number/],
	];
	it.each(contradictions)("that has %s is refused with both places and what to do", async (_, rows, message) => {
		const error = await errorOf(read(write(`${rows.join("\n")}\n`)));
		expect(error.code).toBe("ARL_DATA");
		expect(error.message).toMatch(message);
		expect(error.hint).toContain("mongoexport");
	});

	const malformed = [
		'{"$numberInt":"x"}',
		'{"$numberInt":"2147483648"}',
		'{"$numberLong":"9223372036854775808"}',
		'{"$oid":"65f0"}',
		'{"$date":"soon"}',
		'{"$binary":{"base64":"YQ=="}}',
		'{"$numberDouble":"1,5"}',
		'[{"$undefined":true}]',
	];
	it.each(malformed)("with %s is refused with the place", async (value) => {
		const path = write(`{"_id":{"$oid":"65f0a1b2c3d4e5f6a7b8c9d0"},"a":{"b":[0,${value}]}}\n`);
		expect((await errorOf(read(path))).message).toContain(`${path}:1: a.b[1]`);
	});
});

describe("what only looks like Extended JSON stays as it is, byte for byte", () => {
	const rows = [
		'{"messages": [], "tools": [{"parameters": {"$ref": "#/$defs/x", "$defs": {"x": {"$id": "a", "minimum": 1.0}}}}]}',
		'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": {"_id": {"$oid": "65f0a1b2c3d4e5f6a7b8c9d0"}, "n": {"$numberInt": "3"}}}}]}], "weight": 1.0}',
		'{"messages": [], "filter": {"age": {"$gt": 3, "$lt": 5}}, "meta": {"doc": {"$oid": "65f0a1b2c3d4e5f6a7b8c9d0"}}}',
		'{"text": "{\\"$numberInt\\": \\"3\\"}", "$numberInt": "3", "other": {"$numberInt": "3", "more": 1}}',
	];
	it.each(rows)("%s", async (row) => {
		const { rows: found, notices } = await read(write(`${row}\n`));
		expect(found).toEqual([row]);
		expect(notices).toEqual([]);
		expect(strayExtendedJson(Buffer.from(row))).toBeNull();
	});
});

describe("a row of Extended JSON behind plain ones", () => {
	it("is a bad row that names the number and what it is", () => {
		const stray = strayExtendedJson(Buffer.from('{"messages":[],"reward":{"$numberDouble":"1.0"}}'));
		expect(stray?.reason).toBe("extended json");
		expect(stray?.message).toMatch(/^reward is a number of MongoDB's Extended JSON/);
	});
});
