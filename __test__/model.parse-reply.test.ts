import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { RecordData } from "../src/data/sources/record.js";
import { loadNative } from "../src/native.js";
import { parseReply } from "../src/run/eval/parse-reply.js";
import { root } from "./support/real.js";

describe("the text of a reply as a message", () => {
	it("has its reasoning, its content and its tool calls apart", () => {
		const call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>';
		expect(parseReply(`<think>\nhm\n</think>\n\nI add.\n${call}\n${call}`)).toEqual({
			role: "assistant",
			reasoning_content: "hm",
			content: "I add.",
			tool_calls: [1, 2].map(() => ({ type: "function", function: { name: "add", arguments: '{"a": 1, "b": [2]}' } })),
		});
		expect(parseReply("all of it\n</think>\nyes")).toEqual({
			role: "assistant",
			reasoning_content: "all of it",
			content: "yes",
		});
		expect(parseReply("<think>\n\n</think>\n\nyes")).toEqual({ role: "assistant", content: "yes" });
		expect(parseReply(" plain \n")).toEqual({ role: "assistant", content: " plain \n" });
		expect(parseReply("<think>\nnever ends")).toEqual({ role: "assistant", content: "<think>\nnever ends" });
	});

	it("keeps the text of the arguments, and writes one where they stand elsewhere", () => {
		const argumentsOf = (body: string) =>
			parseReply(`<tool_call>${body}</tool_call>`).tool_calls?.map((call) => call.function.arguments);
		expect(argumentsOf('{"name": "f", "arguments": {"a":  1.0}}')).toEqual(['{"a":  1.0}']);
		expect(argumentsOf('{"arguments": {"a":  1}, "name": "f"}')).toEqual(['{"a":1}']);
		expect(argumentsOf('{"name": "f", "arguments": {"a": 1}, "id": {}}')).toEqual(['{"a":1}']);
		expect(argumentsOf('{"name": "f"}')).toEqual(["{}"]);
	});

	it.each(["no json", '{"arguments": {}}', '{"name": 3}', '{"name": "f", "arguments": "text"}', "null"])(
		"leaves the tool call %s in the content",
		(body) => {
			const text = `<tool_call>\n${body}\n</tool_call>`;
			expect(parseReply(text)).toEqual({ role: "assistant", content: text });
		},
	);

	it("renders to the very tokens of the reply it was parsed from", () => {
		const encoder = loadNative().TextEncoder.open({ modelDir: join(root, "assets", "model"), truncation: "error" });
		const lines = readFileSync(join(root, "assets", "heldout.jsonl"), "utf8")
			.trim()
			.split("\n")
			.slice(0, 60);
		const bytes = (row: RecordData) => Buffer.from(JSON.stringify(row));
		encoder.detect([Buffer.from(lines[0] ?? "")]);
		let calls = 0;
		for (const line of lines) {
			const row = JSON.parse(line) as RecordData;
			const { inputIds, spans } = encoder.encode(bytes(row));
			for (const { message, first, last } of spans) {
				const parsed = parseReply(encoder.decode(inputIds.subarray(first, last + 1), true).trimEnd());
				calls += parsed.tool_calls?.length ?? 0;
				row.messages[message] = parsed;
			}
			expect(encoder.encode(bytes(row)).inputIds).toEqual(inputIds);
		}
		expect(calls).toBeGreaterThan(20);
	});
});
