/** What is in `assets/` is what the scripts next to it make, fits its bound, and keeps the held-out calls apart. */
import { execFileSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, describe, expect, it } from "vitest";

interface Message {
	role: string;
	content: string | null;
	train?: boolean;
	tool_calls?: { id: string; function: { name: string; arguments: string } }[];
	tool_call_id?: string;
}

interface Row {
	messages: Message[];
	tools: { function: { name: string; parameters: { properties: Record<string, unknown> } } }[];
}

const assets = fileURLToPath(new URL("../assets", import.meta.url));
const made = mkdtempSync(join(tmpdir(), "arl-assets-"));
afterAll(() => rmSync(made, { recursive: true, force: true }));

function rowsOf(name: string): Row[] {
	const lines = readFileSync(join(assets, name), "utf8").trimEnd().split("\n");
	return lines.map((line) => JSON.parse(line) as Row);
}

function filesOf(folder: string): string[] {
	return readdirSync(folder, { recursive: true, encoding: "utf8" }).filter((name) =>
		statSync(join(folder, name)).isFile(),
	);
}

const callsOf = (row: Row) => row.messages.flatMap((message) => message.tool_calls ?? []);
const trainedOf = (row: Row) => row.messages.filter((m) => m.role === "assistant" && m.train !== false);

const train = rowsOf("train.jsonl");
const heldOut = rowsOf("heldout.jsonl");

describe("assets", () => {
	it("are made by their scripts bit for bit", () => {
		execFileSync(process.execPath, [join(assets, "make", "make.mjs"), made], { stdio: "pipe" });
		const names = filesOf(made);
		expect(names).toContain("train.jsonl");
		expect(names).toContain(join("model", "tokenizer.json"));
		for (const name of names) {
			expect(readFileSync(join(made, name)).equals(readFileSync(join(assets, name))), name).toBe(true);
		}
	});

	it("fit in 8 MB", () => {
		const bytes = filesOf(assets).reduce((sum, name) => sum + statSync(join(assets, name)).size, 0);
		expect(bytes).toBeLessThanOrEqual(8_000_000);
	});

	it("hold out every call that a held-out row makes, and every conversation", () => {
		const keyOf = (call: { function: { name: string; arguments: string } }) =>
			`${call.function.name} ${call.function.arguments}`;
		const trainedCalls = new Set(train.flatMap(callsOf).map(keyOf));
		const heldOutCalls = heldOut.flatMap(callsOf).map(keyOf);
		expect(heldOutCalls.length).toBeGreaterThan(100);
		expect(heldOutCalls.filter((key) => trainedCalls.has(key))).toEqual([]);
		const conversations = new Set(train.map((row) => JSON.stringify(row.messages)));
		expect(heldOut.filter((row) => conversations.has(JSON.stringify(row.messages)))).toEqual([]);
	});

	it("are an agent's rows: calls of offered tools with all arguments, results for each, several turns, several trained replies", () => {
		for (const row of [...train, ...heldOut]) {
			const offered = new Map(
				row.tools.map((tool) => [tool.function.name, Object.keys(tool.function.parameters.properties)]),
			);
			for (const call of callsOf(row)) {
				expect(Object.keys(JSON.parse(call.function.arguments) as object)).toEqual(offered.get(call.function.name));
			}
			expect(row.messages.filter((m) => m.role === "tool").map((m) => m.tool_call_id)).toEqual(
				callsOf(row).map((call) => call.id),
			);
			expect(row.messages.at(-1)?.role).toBe("assistant");
			expect(trainedOf(row).length).toBeGreaterThan(0);
		}
		for (const rows of [train, heldOut]) {
			const share = (is: (row: Row) => boolean) => rows.filter(is).length / rows.length;
			expect(share((row) => row.messages.filter((m) => m.role === "user").length > 1)).toBeGreaterThan(0.3);
			expect(share((row) => trainedOf(row).length > 1)).toBeGreaterThan(0.8);
			expect(share((row) => row.messages.some((m) => (m.tool_calls?.length ?? 0) > 1))).toBeGreaterThan(0.05);
			expect(share((row) => row.messages.some((m) => m.train === false))).toBeGreaterThan(0.02);
			expect(share((row) => callsOf(row).length === 0)).toBeGreaterThan(0.02);
		}
	});
});
