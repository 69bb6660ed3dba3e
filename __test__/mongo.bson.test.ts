/** BSON bytes to JSON text: what JavaScript objects would lose is kept. */
import { Binary, BSON, Code, Decimal128, Double, Int32, Long, MaxKey, ObjectId, Timestamp } from "mongodb";
import { describe, expect, it } from "vitest";
import { bsonText, documentOf, entries, get, numberOf, valueKey } from "../src/mongo/bson-json.js";
import { problemOf } from "./support/problem.js";

const text = (document: BSON.Document) => bsonText(documentOf(BSON.serialize(document)));

/** A document with its keys in this order, which no JavaScript object could hold where they look like integers. */
function ordered(...fields: [key: string, value: unknown][]): Uint8Array {
	const elements = fields.map(([key, value]) => {
		const one = Buffer.from(BSON.serialize({ v: value }));
		return Buffer.concat([one.subarray(4, 5), Buffer.from(`${key}\0`), one.subarray(7, -1)]);
	});
	const body = Buffer.concat([Buffer.alloc(4), ...elements, Buffer.alloc(1)]);
	body.writeInt32LE(body.length, 0);
	return body;
}

describe("a document as JSON text", () => {
	it("keeps floats floats, integers integers, and both exact", () => {
		const numbers = {
			float: new Double(1),
			negativeZero: new Double(-0),
			small: new Double(1e-7),
			large: new Double(2 ** 53),
			tenth: new Double(0.1),
			int: new Int32(-7),
			long: Long.fromString("9223372036854775807"),
			beyond: Long.fromString("9007199254740993"),
		};
		expect(text(numbers)).toBe(
			'{"float":1.0,"negativeZero":-0.0,"small":1e-7,"large":9007199254740992.0,"tenth":0.1,"int":-7,"long":9223372036854775807,"beyond":9007199254740993}',
		);
	});

	it("keeps the order of keys, also of those that look like integers, and keys with dots and dollars", () => {
		const bytes = ordered(["10", new Int32(1)], ["2", new Int32(2)], ["b", null], ["a.b", "x"], ["$ref", "#/$defs/y"]);
		expect(bsonText(documentOf(bytes))).toBe('{"10":1,"2":2,"b":null,"a.b":"x","$ref":"#/$defs/y"}');
	});

	it("keeps null apart from absent", () => {
		expect(text({ a: null, b: [null, {}, []] })).toBe('{"a":null,"b":[null,{},[]]}');
	});

	it("writes ids as hexadecimal digits, dates in ISO 8601, decimals as text, and bytes in base64", () => {
		const values = {
			id: new ObjectId("64f0000000000000000000ab"),
			at: new Date("2026-11-22T18:00:00.123Z"),
			price: Decimal128.fromString("1.10"),
			bytes: new Binary(Buffer.from([0, 255, 1])),
			yes: true,
			no: false,
		};
		expect(text(values)).toBe(
			'{"id":"64f0000000000000000000ab","at":"2026-11-22T18:00:00.123Z","price":"1.10","bytes":"AP8B","yes":true,"no":false}',
		);
	});

	it("keeps every character of a string", () => {
		const value = 'a"\\\n\u2028 \u{1f600} é \ufffd \u0001';
		expect(JSON.parse(text({ value })).value).toBe(value);
	});

	it("is what JSON.parse reads as the same values", () => {
		const value = { a: [1, { b: [[], [{ c: "d" }]] }], e: "", f: { g: { h: null } } };
		expect(JSON.parse(text(value))).toEqual(value);
	});
});

describe("what has no JSON text", () => {
	it.each([
		["NaN", { a: { b: [1, new Double(Number.NaN)] } }, "not finite", "`a.b[1]`: NaN has no JSON text"],
		["infinity", { a: Number.POSITIVE_INFINITY }, "not finite", "`a`: Infinity has no JSON text"],
		["code", { a: new Code("x") }, "wrong type", "`a`: code has no JSON text"],
		["a regular expression", { a: /x/ }, "wrong type", "`a`: a regular expression has no JSON text"],
		["a timestamp", { a: new Timestamp({ t: 1, i: 1 }) }, "wrong type", "`a`: a timestamp has no JSON text"],
		["the largest key", { a: new MaxKey() }, "wrong type", "`a`: a value of type 127 has no JSON text"],
	])("is reported with its key: %s", (_, document, reason, message) => {
		const problem = problemOf(() => text(document));
		expect(problem).toMatchObject({ reason, message });
	});

	it("is reported where bytes are no UTF-8 and where they are no document", () => {
		const bytes = Buffer.from(BSON.serialize({ a: "xx" }));
		bytes[bytes.indexOf("xx")] = 0xff;
		expect(problemOf(() => bsonText(documentOf(bytes))).reason).toBe("wrong encoding");
		const long = Buffer.from(BSON.serialize({ a: "xx" }));
		long.writeInt32LE(1000, 7);
		expect(problemOf(() => bsonText(documentOf(long))).reason).toBe("wrong bson");
		let deep: BSON.Document = {};
		for (let i = 0; i < 300; i++) deep = { a: deep };
		expect(problemOf(() => text(deep)).message).toContain("levels of nesting");
	});
});

describe("values in a document", () => {
	it("are found by key, with their number, and equal ones have equal keys", () => {
		const document = documentOf(BSON.serialize({ a: new Int32(3), b: new Double(2.5), c: Long.fromNumber(4), d: "x" }));
		expect([...entries(document)].map(([key]) => key)).toEqual(["a", "b", "c", "d"]);
		expect(["a", "b", "c", "d", "e"].map((key) => numberOf(get(document, key)))).toEqual([3, 2.5, 4, null, null]);
		const id = new ObjectId();
		const [one, two] = [{ x: id }, { y: 1, x: id }].map((value) => get(documentOf(BSON.serialize(value)), "x"));
		expect(one && two && valueKey(one) === valueKey(two)).toBe(true);
	});
});
