/** JSON taken apart and put together again: nothing is rounded, reordered or guessed. */
import { describe, expect, it } from "vitest";
import { type JsonValue, jsonText, parseJson, RowProblem } from "../src/data/sources/json-value.js";
import { fc, holds } from "./support/properties.js";

const bytes = (text: string) => new TextEncoder().encode(text);
const again = (text: string) => jsonText(parseJson(bytes(text)));

describe("JSON as exact values", () => {
	it.each([
		'{"b":1,"a":1.0,"2":null,"1":[true,false,{}],"__proto__":{"x":[]}}',
		"[0,-7,9007199254740993,18446744073709551616,-170141183460469231731687303715884105728]",
		"[1.0,0.1,-0.0,1e+300,5e-324,123456789012345680000.0]",
		'"\\u0000\\n\\"\\\\é😀\u2028"',
		'{"$ref":"#/$defs/a.b","$id":"x","":0}',
	])("writes what it reads: %s", (text) => {
		expect(again(text)).toBe(text);
	});

	it("is every value that its text was made of", () => {
		const text = fc.string({ unit: "binary" });
		const { value } = fc.letrec<{ value: JsonValue }>((tie) => ({
			value: fc.oneof(
				{ maxDepth: 4 },
				fc.constantFrom(null, true, false),
				fc.bigInt(),
				fc.double({ noNaN: true, noDefaultInfinity: true }),
				text,
				fc.array(tie("value"), { maxLength: 4 }),
				fc.array(fc.tuple(text, tie("value")), { maxLength: 4 }).map((entries) => new Map(entries)),
			),
		}));
		const isItself = (made: JsonValue) => {
			const written = jsonText(made);
			expect(parseJson(bytes(written))).toEqual(made);
			expect(again(written)).toBe(written);
		};
		holds(500, fc.property(value, isItself));
	});

	it("reads every spelling of the same value", () => {
		expect(again(' \t{ "a" : [ 1 , 2e0 ] ,\r\n"b":"\\u00e9\\ud83d\\ude00\\/" } ')).toBe('{"a":[1,2.0],"b":"é😀/"}');
		expect(again("-0")).toBe("0");
		expect(again("\uFEFF1")).toBe("1");
	});

	it("keeps a repeated key's first place and last value", () => {
		expect(again('{"a":1,"b":2,"a":3}')).toBe('{"a":3,"b":2}');
	});

	it.each([
		["", "not json"],
		["{", "not json"],
		['{"a":1,}', "not json"],
		["[1,]", "not json"],
		["{a:1}", "not json"],
		['{"a" 1}', "not json"],
		["01", "not json"],
		["1.", "not json"],
		[".5", "not json"],
		["+1", "not json"],
		["NaN", "not json"],
		["1e999", "not json"],
		["tru", "not json"],
		["1 2", "not json"],
		['"a', "not json"],
		['"a\nb"', "not json"],
		['"\\x"', "not json"],
		['"\\u12g4"', "not json"],
		['"\\ud83d"', "lone surrogate"],
		['"\\ude00"', "lone surrogate"],
		['"\\ud83d\\u0041"', "lone surrogate"],
		["[".repeat(300), "too deep"],
	])("refuses %s", (text, reason) => {
		let thrown: unknown;
		try {
			parseJson(bytes(text));
		} catch (error) {
			thrown = error;
		}
		expect(thrown).toBeInstanceOf(RowProblem);
		expect(thrown).toMatchObject({ reason });
	});

	it("refuses bytes that are no UTF-8", () => {
		expect(() => parseJson(Uint8Array.of(0x22, 0xff, 0x22))).toThrow("UTF-8");
	});
});
