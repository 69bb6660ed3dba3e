import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { parsedRows } from "../src/data/sources/convert.js";
import { maxRowBytes } from "../src/data/sources/row-size.js";
import type { Source } from "../src/data/sources/source.js";
import { TokenPrefetcher } from "../src/data/tokens/prefetch.js";
import { exportRows } from "../src/mongo/export.js";
import { checkImport } from "../src/mongo/import.js";
import type { DatabaseRows } from "../src/mongo/source.js";
import { loadNative } from "../src/native.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, root } from "./support/real.js";

const folder = temporaryFolder();
const native = loadNative();

/** A row of exactly so many bytes. */
function rowOf(bytes: number): Buffer {
	const row = Buffer.from('{"messages":[{"role":"user","content":"?"},{"role":"assistant","content":""}]}');
	return Buffer.concat([row.subarray(0, -4), Buffer.alloc(bytes - row.length, "a"), row.subarray(-4)]);
}

const largest = rowOf(maxRowBytes());
const tooLarge = rowOf(maxRowBytes() + 1);

/** Rows in memory; `bytes` 0: their size is known only when they are read. */
function sourceOf(rows: Uint8Array[], bytes = true): Source {
	return {
		name: "rows",
		length: rows.length,
		blankLines: 0,
		identity: "",
		location: (row) => `rows:${row + 1}`,
		bytes: (row) => (bytes ? (rows[row]?.length ?? 0) : 0),
		read: async (indexes) => Array.from(indexes, (row) => rows[row] as Uint8Array),
		close: async () => {},
	};
}

const REFUSED = { location: "rows:2", reason: "row too large" };
const SAID = /^32\.1 MiB in one row; at most 32 MiB are read$/;

describe("a row has one bound, the core's", { timeout: 60_000 }, () => {
	it("which refuses a byte more", async () => {
		const encoder = native.TextEncoder.open({ modelDir: join(root, "assets", "model"), truncation: "error" });
		encoder.detect([rowOf(100)]);
		expect((await errorOf(() => encoder.encode(tooLarge))).message).toContain("a row may have 32 MiB");
	});

	it.each([true, false])(
		"where rows are encoded, also where their size is known only when they are read (%s)",
		async (known) => {
			const source = sourceOf([largest, tooLarge, rowOf(100)], known);
			const core = fakeNative();
			const cache = core.TokenCache.open(
				folder,
				`key-${known}`,
				3,
				core.TextEncoder.open({ modelDir: "", truncation: "error" }),
			);
			const prefetcher = new TokenPrefetcher({ source, cache, order: Uint32Array.of(0, 1, 2) });
			prefetcher.start();
			while (!prefetcher.complete) await prefetcher.progress();
			expect(prefetcher.bad).toEqual([{ row: 1, ...REFUSED, message: expect.stringMatching(SAID) }]);
		},
	);

	it("where rows go through a function", async () => {
		const failures: unknown[] = [];
		for await (const { failure } of parsedRows(sourceOf([largest, tooLarge, rowOf(100)]))) failures.push(failure);
		expect(failures).toEqual([null, { reason: REFUSED.reason, message: expect.stringMatching(SAID) }, null]);
	});

	it("where rows are imported into a database", async () => {
		const bad = await checkImport({ source: sourceOf([rowOf(100), tooLarge]), kind: "Record", split: null });
		expect(bad).toEqual([{ row: 1, ...REFUSED, message: expect.stringMatching(SAID) }]);
	});

	it("where rows of a database are exported", async () => {
		const out = join(folder, "out.jsonl");
		const rows = sourceOf([largest, tooLarge]) as unknown as DatabaseRows;
		const { bad } = await exportRows({ rows, out, skip: true });
		expect(bad).toEqual([{ row: 1, ...REFUSED, message: expect.stringMatching(SAID) }]);
		expect(readFileSync(out).length).toBe(largest.length + 1);
	});

	it("where images are put into rows: what that writes is read, and what would not be is not written", async () => {
		const pixel = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw==";
		const image = (name: string, rows: Buffer[]) => {
			const path = join(folder, name);
			writeFileSync(path, Buffer.concat(rows.flatMap((row) => [row, Buffer.from("\n")])));
			return path;
		};
		const small = Buffer.from(
			`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"${pixel}"}}]}]}`,
		);
		const path = image("images.jsonl", [small, tooLarge]);
		const { code, stderr } = await arl(["images", "--train_file", path, "--out", join(folder, "with.jsonl")]);
		expect(code).toBe(3);
		expect(stderr).toMatch(/images\.jsonl:2: row too large: 32\.1 MiB in one row; at most 32 MiB are read/);
		const good = await arl([
			"images",
			"--train_file",
			image("good.jsonl", [small, largest]),
			"--out",
			join(folder, "good-with.jsonl"),
		]);
		expect(good.code, good.stderr).toBe(0);
	});
});
