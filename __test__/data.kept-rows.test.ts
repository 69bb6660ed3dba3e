import { readdirSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { KeptRows } from "../src/data/sources/kept-rows.js";
import { Scratch } from "../src/data/sources/scratch.js";
import { loadNative } from "../src/native.js";
import { temporaryFolder } from "./support/folder.js";

const folder = temporaryFolder();

describe("rows that are kept", () => {
	it("are read as they were, in any order, and again", async () => {
		const scratch = new Scratch(loadNative(), folder);
		const kept = new KeptRows(scratch);
		const rows = Array.from({ length: 50 }, (_, i) => Buffer.alloc(1 + ((i * 37) % 101), i));
		await Promise.all(rows.map((row, i) => kept.keep(i, row)));
		// The first content stays: the row is the same.
		await kept.keep(3, Buffer.from("other"));
		for (const i of [3, 49, 0, 3, 17]) expect(Buffer.from((await kept.read(i)) ?? [])).toEqual(rows[i]);
		expect(await kept.read(50)).toBe(null);
		// No name is left for a killed process to leave behind.
		expect(readdirSync(scratch.path())).toEqual(["lock"]);
		await kept.close();
		scratch.close();
	});

	it("free their file once none of its rows is needed", async () => {
		const scratch = new Scratch(loadNative(), folder);
		const kept = new KeptRows(scratch);
		const large = Buffer.alloc(40 * 1024 * 1024, 1);
		for (let i = 0; i < 4; i++) {
			await kept.keep(i, large);
			await kept.forget(i);
		}
		expect(kept.bytes).toBeLessThanOrEqual(large.length);
		expect(await kept.read(0)).toBe(null);
		await kept.close();
		scratch.close();
	});
});
