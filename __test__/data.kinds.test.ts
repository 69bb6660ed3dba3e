import { mkdtempSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { checkRows } from "../src/api/check-rows.js";
import { loadNative } from "../src/native.js";
import { openRows } from "../src/run/setup/dataset.js";
import { resolveArgs } from "../src/run/setup/options.js";
import { temporaryFolder } from "./support/folder.js";
import { type Given, give, KINDS } from "./support/kinds.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();
const model = join(root, "assets", "model");
const native = loadNative();

/** A row with all that may go another way in some kind: tools, calls, null content, text that wants quoting, a float. */
function row(i: number, role = "user"): string {
	const call = { type: "function", function: { name: "look", arguments: { place: `row ${i}`, again: false } } };
	const messages = [
		{ role, content: `Say "${i}", please;\nthen stop\t, ok?` },
		{ role: "assistant", content: "", tool_calls: [call] },
		{ role: "tool", content: '{"found": 1.0}' },
		{ role: "assistant", content: `Grüße ${i} 😀` },
	];
	const parameters = { type: "object", properties: { place: { type: "string" }, again: { type: "boolean" } } };
	const tools = [{ type: "function", function: { name: "look", description: "Looks.", parameters } }];
	return JSON.stringify({ messages, tools });
}

function argsOf({ train_file, dataset }: Given, cache_dir: string) {
	const given = { model_name_or_path: model, output_dir: join(folder, "out"), cache_dir };
	return resolveArgs({ ...given, ...(train_file && { train_file }) }, dataset !== undefined).args;
}

/** Every row, as it reaches the core. */
async function bytesOf(given: Given): Promise<Uint8Array[]> {
	const args = argsOf(given, mkdtempSync(join(folder, "cache-")));
	const code = { dataset: given.dataset ?? null, convert: null };
	const { source } = await openRows({ native, args, code, signal: null, datasetId: null, readFirst: true });
	try {
		return (await source.read(Array.from({ length: source.length }, (_, i) => i))) as Uint8Array[];
	} finally {
		await source.close();
	}
}

/** Token ids and weights of every row, as training would get them. */
async function encoded(given: Given): Promise<unknown[]> {
	const rows = await bytesOf(given);
	const encoder = native.TextEncoder.open({ modelDir: model, truncation: "error" });
	encoder.detect(rows);
	return rows.map((bytes) => {
		const { inputIds, weights } = encoder.encode(bytes);
		return [Array.from(inputIds), Array.from(weights)];
	});
}

describe("every kind of source", { timeout: 60_000 }, () => {
	const good = Array.from({ length: 9 }, (_, i) => row(i));

	it.each(KINDS)("%s: gives the tokens that the same rows have as JSONL", async (_, make) => {
		const [, jsonl] = KINDS[0] as (typeof KINDS)[number];
		const expected = await encoded(await give(folder, jsonl, good));
		expect(expected).toHaveLength(9);
		expect(await encoded(await give(folder, make, good))).toEqual(expected);
	});

	it.each(KINDS)("%s: delivers lists, objects and numbers as the same values", async (_, make) => {
		const rows = good.map((text, i) => {
			const more = { images: [`${i}.png`, "b.png"], advantages: { "1": 1.5, "3": -0.25 }, reward: i + 0.5 };
			return { ...JSON.parse(text), ...more, functions: [{ name: `f${i}`, parameters: { type: "object" } }] };
		});
		const lines = rows.map((row) => JSON.stringify(row));
		const found = await bytesOf(await give(folder, make, lines));
		expect(found.map((bytes) => JSON.parse(Buffer.from(bytes).toString()))).toEqual(rows);
	});

	it.each(KINDS)(
		"%s: says where a row in the middle is that cannot be used, and leaves nothing behind",
		async (_, make) => {
			const rows = good.with(5, row(5, "robot"));
			const given = await give(folder, make, rows);
			const cache = mkdtempSync(join(folder, "cache-"));
			const code = { dataset: given.dataset ?? null, convert: null };
			const report = await checkRows({ native, args: argsOf(given, cache), code, signal: null });
			expect(report.bad.map(({ location, reason }) => [location, reason])).toEqual([
				[given.location(5), "unknown role"],
			]);
			expect(report.usable).toBe(8);
			expect(readdirSync(cache)).toEqual([]);
		},
	);
});
