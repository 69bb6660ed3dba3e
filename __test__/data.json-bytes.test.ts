import { describe, expect, it } from "vitest";
import { JsonBytes } from "../src/data/json-bytes.js";
import { isBlankText, isJson, isNestedJson, objectEntries } from "../src/data/json-scan.js";

/** Numbers below a bound, the same ones each time. */
function numbers(seed: number): (below: number) => number {
	let state = seed;
	return (below) => {
		state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
		return Math.floor((state / 2 ** 32) * below);
	};
}

const random = numbers(3);
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

function text(length: number): string {
	return Array.from({ length }, () => (random(3) > 0 ? "x" : ALPHABET[random(ALPHABET.length)])).join("");
}

describe("strings as bytes", () => {
	it("are escaped as JSON.stringify escapes them, at every length and place", () => {
		for (let length = 0; length < 200; length++) {
			const out = new JsonBytes();
			const values = Array.from({ length: 1 + random(4) }, () => text(length));
			for (const value of values) out.string(Buffer.from(value));
			expect(out.written().toString("utf8")).toBe(values.map((value) => JSON.stringify(value)).join(""));
		}
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
	function value(depth: number): unknown {
		const kind = random(depth > 3 ? 4 : 6);
		if (kind === 0) return null;
		if (kind === 1) return random(1e6) / 64;
		if (kind === 2) return random(2) === 0;
		if (kind === 3) return text(random(12));
		if (kind === 4) return Array.from({ length: random(4) }, () => value(depth + 1));
		return Object.fromEntries(Array.from({ length: random(4) }, () => [text(random(5)), value(depth + 1)]));
	}

	it("finds an object's entries with their bytes, however it is indented", () => {
		for (let i = 0; i < 500; i++) {
			const object = Object.fromEntries(Array.from({ length: random(6) }, (_, k) => [`${k}${text(3)}`, value(0)]));
			const written = JSON.stringify(object, null, i % 3 === 0 ? "\t" : i % 3);
			const entries = objectEntries(Buffer.from(` ${written}\n`));
			expect(entries?.map(([key]) => key)).toEqual(Object.keys(object));
			for (const [key, bytes] of entries ?? []) {
				const inner = Buffer.from(bytes).toString("utf8");
				expect(JSON.parse(inner)).toEqual(object[key]);
				expect(written).toContain(inner);
			}
		}
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
		expect([" 1.0", '"a"', "nul", "1 2"].map((json) => isJson(bytes(json)))).toEqual([true, true, false, false]);
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
