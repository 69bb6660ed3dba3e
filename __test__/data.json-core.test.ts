/**
 * Rows of Parquet files, databases and images are taken apart by a JSON parser in TypeScript, and every row is read by the
 * core's: both accept the same texts, refuse the others for the same reason, and see the same values.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { floatText } from "../src/data/sources/json-text.js";
import { type JsonValue, jsonText, parseJson, RowProblem } from "../src/data/sources/json-value.js";
import { ArlError } from "../src/errors.js";
import { loadNative, type NativeTextEncoder } from "../src/native.js";
import { temporaryFolder } from "./support/folder.js";
import { fc, holds } from "./support/properties.js";
import { tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

/** Writes the variable `v` of the row, then its messages. */
const TEMPLATE = `{%- if v is defined %}{{- '<|im_start|>system\\n' ~ (v | tojson) ~ '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{%- endfor %}`;

let encoder: NativeTextEncoder;
beforeAll(() => {
	const chatTemplate = join(folder, "template.jinja");
	writeFileSync(chatTemplate, TEMPLATE);
	const { model } = tinyPlace(folder, 1);
	encoder = loadNative().TextEncoder.open({ modelDir: model, chatTemplate, truncation: "error" });
});

/** A row in which `value` is the text of the template's variable. */
const rowOf = (value: string) =>
	`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],"chat_template_kwargs":{"v":${value}}}`;

/** The core's reasons for which a text is no JSON, by the reason that TypeScript gives. */
const REASONS: Readonly<Record<string, readonly string[]>> = {
	// The core looks at the first bytes first, and names UTF-16 and a row of white space for what they are.
	"not json": ["not json", "empty row", "wrong encoding"],
	"not UTF-8": ["wrong encoding"],
	"lone surrogate": ["lone surrogate"],
	"too deep": ["nested too deep"],
};
const CORE_REASONS = new Set(Object.values(REASONS).flat());

type Read<T> = { value: T } | { reason: string };

/** What the template wrote of a row, or the reason that the core refuses the row for. */
function byCore(row: Uint8Array): Read<string> {
	try {
		return { value: encoder.encode(row).text };
	} catch (error) {
		if (error instanceof ArlError) return { reason: error.message.slice(0, error.message.indexOf(": ")) };
		throw error;
	}
}

function byTypeScript(row: Uint8Array): Read<JsonValue> {
	try {
		return { value: parseJson(row) };
	} catch (error) {
		if (error instanceof RowProblem) return { reason: error.reason };
		throw error;
	}
}

/** The variable that a row gives the template, as text; undefined: the row has none. */
function variable(row: JsonValue): string | undefined {
	const variables = row instanceof Map ? row.get("chat_template_kwargs") : undefined;
	const value = variables instanceof Map ? variables.get("v") : undefined;
	return value === undefined ? undefined : jsonText(value);
}

/** The same as the core read it, from what the template wrote. */
function written(text: string): string {
	const begin = "<|im_start|>system\n";
	expect(text.startsWith(begin)).toBe(true);
	return jsonText(parseJson(Buffer.from(text.slice(begin.length, text.indexOf("<|im_end|>\n")))));
}

const space = fc.constantFrom("", "", " ", "\n\t\r");
const pieces = ["a", "é", "😀", "\u2028", "\x7f", "|", " ", "{", "]", ","].concat([
	"\\n",
	'\\"',
	"\\\\",
	"\\/",
	"\\u0000",
	"\\u00E9",
	"\\ud83d\\ude00",
	"\\ud83d",
	"\\ude00",
	"\\x",
]);
const string = fc.array(fc.constantFrom(...pieces), { maxLength: 4 }).map((inner) => `"${inner.join("")}"`);
const number = fc.oneof(
	fc.constantFrom("0", "-0", "-0.0", "1.0", "2.50", "1E5", "1e-7", "5e-324", "1e16", "123456789012345680000.0"),
	fc.constantFrom("9007199254740993", "-9223372036854775808", "9223372036854775808", "18446744073709551616"),
	fc.constantFrom("1e400", "01", "1.", ".5", "+1", "-", "1e", "NaN"),
	fc.maxSafeInteger().map(String),
	fc.double({ noNaN: true, noDefaultInfinity: true }).map(floatText),
);
const spaced = (text: fc.Arbitrary<string>) => fc.tuple(space, text, space).map((parts) => parts.join(""));
const { json } = fc.letrec<{ json: string }>((tie) => ({
	json: spaced(
		fc.oneof(
			{ maxDepth: 3 },
			fc.constantFrom("null", "true", "false"),
			number,
			string,
			fc.array(tie("json"), { maxLength: 3 }).map((items) => `[${items.join()}]`),
			fc
				.array(fc.tuple(spaced(fc.oneof(string, fc.constantFrom('"a"', '"__proto__"'))), tie("json")), { maxLength: 3 })
				.map((entries) => `{${entries.map((entry) => entry.join(":")).join()}}`),
		),
	),
}));
/** Arrays and objects in each other, about as many as there may be. */
const deep = fc
	.array(fc.constantFrom<[string, string]>(["[", "]"], ['{"a":', "}"]), { minLength: 250, maxLength: 258 })
	.map(
		(levels) =>
			`${levels.map(([open]) => open).join("")}0${levels
				.map(([, close]) => close)
				.reverse()
				.join("")}`,
	);

/** Bytes at a place that are replaced; no place is beyond the end. */
const change = fc.record({
	at: fc.nat(400),
	removed: fc.nat(2),
	put: fc.constantFrom(...'{}[]":,\\u0-e+. \n\0'.split(""), "", "", "\uFEFF", "é").map((text) => Buffer.from(text)),
	bytes: fc.constantFrom([], [], [], [0xff], [0xc3], [0xff, 0xfe]),
});

function changed(text: string, changes: (typeof change extends fc.Arbitrary<infer Change> ? Change : never)[]): Buffer {
	return changes.reduce((row, { at, removed, put, bytes }) => {
		const place = at % (row.length + 1);
		return Buffer.concat([row.subarray(0, place), put, Buffer.from(bytes), row.subarray(place + removed)]);
	}, Buffer.from(text));
}

/** Holds the parsers against each other over rows; returns how many both refused, read, and read to a variable. */
function compare(runs: number, rows: fc.Arbitrary<Buffer>): { refused: number; read: number; variables: number } {
	const seen = { refused: 0, read: 0, variables: 0 };
	const agree = (row: Buffer) => {
		const [core, own] = [byCore(row), byTypeScript(row)];
		if ("reason" in own) {
			seen.refused += 1;
			expect(REASONS[own.reason]).toContain("reason" in core ? core.reason : "read");
			return;
		}
		seen.read += 1;
		// What else the core finds wrong with a row, such as a role that is none, is no matter of JSON.
		if ("reason" in core) {
			expect(CORE_REASONS).not.toContain(core.reason);
			return;
		}
		const expected = variable(own.value);
		if (expected === undefined) return;
		seen.variables += 1;
		expect(written(core.value)).toBe(expected);
	};
	const shown = rows.map((row) => Object.assign(row, { [fc.toStringMethod]: () => JSON.stringify(String(row)) }));
	holds(runs, fc.property(shown, agree));
	return seen;
}

describe("the two JSON parsers", () => {
	it("read the same texts to the same values", () => {
		const { variables, refused } = compare(
			1500,
			json.map((value) => Buffer.from(rowOf(value))),
		);
		expect(Math.min(variables, refused)).toBeGreaterThan(200);
	});

	it("accept and refuse the same rows, whatever was changed in their bytes", () => {
		const rows = fc
			.tuple(json, fc.array(change, { minLength: 1, maxLength: 3 }))
			.map(([value, changes]) => changed(rowOf(value), changes));
		const { read, refused } = compare(10_000, rows);
		expect(Math.min(read, refused)).toBeGreaterThan(200);
	});

	it("refuse what is nested deeper than the same bound", () => {
		const { variables, refused } = compare(
			200,
			deep.map((value) => Buffer.from(rowOf(value))),
		);
		expect(Math.min(variables, refused)).toBeGreaterThan(20);
	});
});
