import { describe, expect, it } from "vitest";
import { JsonBytes } from "../src/data/sources/json-bytes.js";
import { isBlankText, isNestedJson, objectEntries } from "../src/data/sources/json-scan.js";
import { fc, holds } from "./support/properties.js";

const ALPHABET = [
	"a",
	"Z",
	" ",
	'"',
	"\\",
	"/",
	"\n",
	"\r",
	"\t",
	"\b",
	"\f",
	"\0",
	"\x1f",
	"\x7f",
	"é",
	"€",
	"😀",
	"\u2028",
	"!",
	"#",
];

const character = fc.oneof(
	{ arbitrary: fc.constant("x"), weight: 2 },
	{ arbitrary: fc.constantFrom(...ALPHABET), weight: 1 },
);
const text = (minLength: number, maxLength: number) =>
	fc.string({ unit: character, minLength, maxLength, size: "max" });

describe("strings as bytes", () => {
	it("are escaped as JSON.stringify escapes them, at every length and place", () => {
		const several = fc.array(text(0, 199), { minLength: 1, maxLength: 4 });
		const escaped = (values: string[]) => {
			const out = new JsonBytes();
			for (const value of values) out.string(Buffer.from(value));
			expect(out.written().toString("utf8")).toBe(values.map((value) => JSON.stringify(value)).join(""));
		};
		holds(800, fc.property(several, escaped));
	});

	it("may be longer than the buffer, and all be escaped", () => {
		for (const value of ["\u0001".repeat(300_000), "€\n".repeat(100_000), `${"y".repeat(65_534)}"end`]) {
			const out = new JsonBytes();
			out.string(Buffer.from(value));
			expect(out.written().toString("utf8")).toBe(JSON.stringify(value));
		}
	});

	it("keep bytes that are no UTF-8", () => {
		const out = new JsonBytes();
		out.string(Buffer.from([0xff, 0x22, 0xc3]));
		expect([...out.written()]).toEqual([0x22, 0xff, 0x5c, 0x22, 0xc3, 0x22]);
	});
});

describe("scanning JSON text", () => {
	const { value } = fc.letrec((tie) => ({
		value: fc.oneof(
			{ maxDepth: 4 },
			fc.constant(null),
			fc.nat(1e6 - 1).map((number) => number / 64),
			fc.boolean(),
			text(0, 11),
			fc.array(tie("value"), { maxLength: 3 }),
			fc.array(fc.tuple(text(0, 4), tie("value")), { maxLength: 3 }).map((entries) => Object.fromEntries(entries)),
		),
	}));
	const object = fc
		.array(fc.tuple(text(3, 3), value), { maxLength: 5 })
		.map((entries) => Object.fromEntries(entries.map(([key, inner], k) => [`${k}${key}`, inner])));

	it("finds an object's entries with their bytes, however it is indented", () => {
		const found = (whole: Record<string, unknown>, indent: string | number) => {
			const written = JSON.stringify(whole, null, indent);
			const entries = objectEntries(Buffer.from(` ${written}\n`));
			expect(entries?.map(([key]) => key)).toEqual(Object.keys(whole));
			for (const [key, bytes] of entries ?? []) {
				const inner = Buffer.from(bytes).toString("utf8");
				expect(JSON.parse(inner)).toEqual(whole[key]);
				expect(written).toContain(inner);
			}
		};
		holds(500, fc.property(object, fc.constantFrom(1, 2, "\t"), found));
	});

	it("takes whole arrays and objects for nested, and nothing else", () => {
		const bytes = (string: string) => Buffer.from(string);
		for (const yes of ["[]", " {} \n", '["]"]', '{"a":"\\"}"}', "[[{}],[]]"])
			expect(isNestedJson(bytes(yes)), yes).toBe(true);
		for (const no of ["", "1", '"[]"', "[", "[]]", "[] []", "[],", '["\n"]', '{"a":"}', "null"]) {
			expect(isNestedJson(bytes(no)), no).toBe(false);
		}
		expect(isBlankText(bytes(" \t\r\n"))).toBe(true);
		expect(isBlankText(bytes(" x"))).toBe(false);
	});

	it("takes no broken object for one", () => {
		for (const broken of [
			"",
			"[]",
			"{",
			'{"a"}',
			'{"a":}',
			'{"a":1',
			'{"a":1,}',
			'{"a":1}}',
			"{a:1}",
			'{"a" 1}',
			'{"a":1 2}',
		]) {
			expect(objectEntries(Buffer.from(broken)), broken).toBeNull();
		}
	});
});
