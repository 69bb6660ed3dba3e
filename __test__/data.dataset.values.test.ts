import { describe, expect, it } from "vitest";
import type { Dataset } from "../src/data/sources/custom.js";
import type { RecordData } from "../src/data/sources/record.js";
import { recordText } from "../src/data/sources/record-json.js";
import { onDataset } from "./support/code.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { chatRow, workspace } from "./support/run.js";

const folder = temporaryFolder();
const row = (text: string): RecordData => JSON.parse(chatRow(text));

describe("values of code", () => {
	it.each([
		["a text", "text", /train_dataset\[0\]: not a row: expected an object with messages, got string/],
		["nothing", null, /not a row: .*got null/],
		["a number that is none", { ...row("a"), reward: Number.NaN }, /reward: NaN has no JSON text/],
		["a map", { ...row("a"), advantages: new Map([[1, 1]]) }, /advantages: a Map has no JSON text/],
		["a function", { ...row("a"), step: () => 1 }, /step: a function has no JSON text/],
		["a hole in a list", { messages: [undefined] }, /messages\[0\]: undefined has no JSON text/],
	])("%s is refused with its place", async (_, value, message) => {
		const place = workspace(folder);
		const error = await errorOf(onDataset(place, [value as unknown as RecordData]).train());
		expect(error.code).toBe("ARL_DATA");
		expect(error.message).toMatch(message);
	});

	it("that hold themselves are refused", async () => {
		const place = workspace(folder);
		const circular: Record<string, unknown> = { messages: [] };
		circular.self = circular;
		const error = await errorOf(onDataset(place, [circular as unknown as RecordData]).train());
		expect(error.message).toContain("it contains itself");
	});

	it("become the text that JSON.stringify gives, integers of any size included", () => {
		const value = { a: [1, -2.5, "ä\u2028\ud800", null, true], b: undefined, c: { d: new Date(0) }, "e f": "" };
		expect(recordText(value)).toBe(JSON.stringify(value));
		expect(recordText({ id: 2n ** 64n })).toBe('{"id":18446744073709551616}');
	});

	it("need a data set", () => {
		const place = workspace(folder);
		for (const data of [7, {}, "rows", null]) {
			if (data === null) continue;
			expect(() => onDataset(place, data as unknown as Dataset)).toThrow(/train_dataset: expected an iterable/);
		}
	});
});
