import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { openJsonl } from "../src/data/sources/jsonl.js";
import type { Source } from "../src/data/sources/source.js";
import { TokenPrefetcher } from "../src/data/tokens/prefetch.js";
import { type Faults, fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";

const folder = temporaryFolder();
const good = (text: string) => JSON.stringify({ messages: [{ role: "assistant", content: text }] });

const opened = new Set<Source>();
afterEach(async () => {
	for (const source of opened) await source.close();
	opened.clear();
});

async function prefetcher(lines: (string | Uint8Array)[], options: { faults?: Faults; order?: number[] } = {}) {
	const path = join(folder, `rows-${Math.random()}.jsonl`);
	writeFileSync(path, Buffer.concat(lines.flatMap((line) => [Buffer.from(line), Buffer.from("\n")])));
	const source = await openJsonl(path);
	opened.add(source);
	const native = fakeNative(options.faults);
	const encoder = native.TextEncoder.open({ modelDir: "", truncation: "error" });
	const cache = native.TokenCache.open(folder, path, source.length, encoder);
	const order = Uint32Array.from(options.order ?? Array.from({ length: source.length }, (_, i) => i));
	return { path, cache, source, prefetcher: new TokenPrefetcher({ source, cache, order }) };
}

async function finish(tokens: TokenPrefetcher): Promise<void> {
	tokens.start();
	while (!tokens.complete) {
		await tokens.progress();
		tokens.check();
	}
}

describe("filling the token cache", () => {
	it("fills every row, once", async () => {
		const { prefetcher: tokens, cache } = await prefetcher(Array.from({ length: 1000 }, (_, i) => good(`row ${i}`)));
		await finish(tokens);
		expect(cache.filled()).toBe(1000);
		expect(tokens.counts.rows).toBe(1000);
		expect(tokens.counts.tokens).toBe(cache.lengths().reduce((a, b) => a + b, 0));
	});

	it("has the rows that training needs first ready before the others", async () => {
		const rows = Array.from({ length: 1000 }, (_, i) => good(`row ${i}`));
		const order = Array.from({ length: 1000 }, (_, i) => 999 - i);
		const { prefetcher: tokens, cache } = await prefetcher(rows, { order, faults: { fillMs: 5 } });
		tokens.start();
		await tokens.ready(Uint32Array.of(999, 990));
		expect(cache.filled()).toBeLessThan(1000);
		expect(cache.lengths()[0]).toBe(0);
		await tokens.ready(Uint32Array.of(0));
		expect(cache.filled()).toBe(1000);
	});

	it("goes on with what an earlier run left", async () => {
		const first = await prefetcher([good("a"), good("b"), good("c")], { order: [1] });
		await finish(first.prefetcher);
		const order = Uint32Array.of(0, 1, 2);
		const second = new TokenPrefetcher({ source: first.source, cache: first.cache, order });
		expect(second.pending).toBe(2);
		await finish(second);
		expect(new TokenPrefetcher({ source: first.source, cache: first.cache, order }).complete).toBe(true);
	});

	it("reports every bad row with file, line and reason, counted", async () => {
		const bad = ["{", '{"no":1}', Buffer.from([0x7b, 0x22, 0xff, 0xfe, 0x22, 0x7d])];
		const many = Array.from({ length: 8 }, () => "[");
		const { prefetcher: tokens, path } = await prefetcher([good("a"), ...bad, good("b"), ...many]);
		await finish(tokens);
		const error = tokens.badRows();
		expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		const lines = error.message.split("\n");
		expect(lines[0]).toBe("11 of 13 rows cannot be used (9 not json, 1 no messages, 1 wrong encoding)");
		expect(lines[1]).toBe(`${path}:2: not json: the row is not json`);
		expect(lines[3]).toMatch(/:4: wrong encoding: the row is not UTF-8: byte 0xff at 2 after "\{\\""/);
		expect(lines).toHaveLength(7);
		expect(lines.at(-1)).toBe("... and 6 more");
		expect(tokens.bad).toHaveLength(11);
	});

	it("shows a single bad row alone", async () => {
		const { prefetcher: tokens, path } = await prefetcher([good("a"), "{"]);
		await finish(tokens);
		expect(tokens.badRows().message).toBe(`${path}:2: not json: the row is not json`);
	});

	it("refuses a row of 200 MB before it is read", async () => {
		const { prefetcher: tokens, path } = await prefetcher([good("a"), Buffer.alloc(200 * 1024 * 1024, 0x61)]);
		await finish(tokens);
		expect(tokens.badRows().message).toMatch(`${path}:2: row too large: 200 MiB in one row`);
	});

	it("fails those who wait, once bad rows are no longer only collected", async () => {
		const rows = [...Array.from({ length: 600 }, (_, i) => good(`row ${i}`)), "{"];
		const { prefetcher: tokens } = await prefetcher(rows, { faults: { fillMs: 5 } });
		tokens.start();
		await tokens.ready(Uint32Array.of(0));
		tokens.failOnBadRows();
		const error = await errorOf(tokens.ready(Uint32Array.of(600)));
		expect(error.message).toMatch(/:601: not json/);
	});

	it("passes a failing disk on to those who wait", async () => {
		const { prefetcher: tokens, source } = await prefetcher(Array.from({ length: 600 }, (_, i) => good(`row ${i}`)));
		await source.close();
		opened.delete(source);
		tokens.start();
		const error = await errorOf(tokens.ready(Uint32Array.of(599)));
		expect(error.code).toMatch(/ARL_(IO|INTERNAL)/);
	});
});
