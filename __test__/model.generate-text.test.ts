import { describe, expect, it } from "vitest";
import { ArlError } from "../src/errors.js";
import type { NativeEngine } from "../src/native.js";
import { generateText } from "../src/run/eval/generate-text.js";
import { errorOf } from "./support/folder.js";

type OnToken = (prompt: number, token: number) => void;

/** An engine whose replies a test writes; it counts what it is asked for. */
function scripted(generate: (onToken: OnToken, isInterrupted: () => boolean) => Promise<number[]>) {
	const calls: string[] = [];
	const engine = {
		generate: async (_prompts: Int32Array[], _options: unknown, onToken: OnToken = () => {}) => {
			const ids = await generate(onToken, () => calls.includes("interrupt"));
			return [Int32Array.from(ids)];
		},
		interrupt: () => void calls.push("interrupt"),
		discardStep: async () => void calls.push("discard"),
	};
	return { calls, engine: engine as Pick<NativeEngine, "generate" | "interrupt" | "discardStep"> };
}

const tick = () => new Promise<void>((resolve) => setImmediate(resolve));

async function ask(engine: Pick<NativeEngine, "generate" | "interrupt" | "discardStep">, more: object = {}) {
	const parts: string[] = [];
	const result = await generateText({
		engine,
		decode: (ids) => String.fromCharCode(...ids),
		prompt: { inputIds: Int32Array.of(1), positions: new Int32Array(), images: [] },
		options: { maxNewTokens: 5, stopIds: [] },
		stop: [],
		push: (text) => parts.push(text),
		signal: new AbortController().signal,
		...more,
	});
	return { parts, ...result };
}

/** Letters one by one until interrupted, as the engine does. */
const letters = async (onToken: OnToken, isInterrupted: () => boolean) => {
	for (let i = 0; ; i++) {
		onToken(0, 97 + i);
		await tick();
		if (isInterrupted()) throw new ArlError("ARL_INTERRUPTED", "interrupted");
	}
};

describe("a reply of an engine as text", () => {
	it("has tokens that the promise overtook, and ignores calls that come after it", async () => {
		let late: OnToken = () => {};
		const { engine, calls } = scripted(async (onToken) => {
			late = onToken;
			onToken(0, 97);
			return [97, 98, 99];
		});
		const reply = await ask(engine);
		late(0, 98);
		expect(reply).toEqual({ parts: ["a", "b", "c"], text: "abc", tokens: [97, 98, 99], finishReason: "stop" });
		expect(calls).toEqual([]);
	});

	it("ended by its length where all tokens came that may come", async () => {
		const { engine } = scripted(async () => [97, 98, 99, 100, 101]);
		expect(await ask(engine)).toMatchObject({ finishReason: "length", text: "abcde" });
	});

	it("ends at a stop text, and takes back an interrupt that came too late", async () => {
		const { engine, calls } = scripted(letters);
		expect(await ask(engine, { stop: ["cd"] })).toMatchObject({ text: "ab", finishReason: "stop" });
		expect(calls).toEqual(["interrupt", "discard"]);
		const over = scripted(async () => [97, 98, 99, 100, 101]);
		expect(await ask(over.engine, { stop: ["e"] })).toMatchObject({ text: "abcd", finishReason: "stop" });
		expect(over.calls).toEqual(["interrupt", "discard"]);
	});

	it("fails with ARL_INTERRUPTED where its signal is aborted, before it starts too", async () => {
		const controller = new AbortController();
		const { engine, calls } = scripted(letters);
		const parts: string[] = [];
		const push = (text: string) => {
			parts.push(text);
			if (text === "c") controller.abort("enough");
		};
		const error = await errorOf(ask(engine, { push, signal: controller.signal }));
		expect(error).toMatchObject({ code: "ARL_INTERRUPTED", cause: "enough" });
		expect(parts).toEqual(["a", "b", "c"]);
		expect(calls).toEqual(["interrupt", "discard"]);
		const again = scripted(letters);
		expect((await errorOf(ask(again.engine, { signal: controller.signal }))).code).toBe("ARL_INTERRUPTED");
		expect(again.calls).toEqual([]);
	});

	it("fails with what the tokenizer or the reader throws, and the engine is free", async () => {
		const { engine, calls } = scripted(letters);
		const failing = () => {
			throw new Error("no such token");
		};
		await expect(ask(engine, { decode: failing })).rejects.toThrow("no such token");
		expect(calls).toEqual(["interrupt", "discard"]);
		const broken = scripted(async () => {
			throw new ArlError("ARL_OOM", "no memory");
		});
		expect((await errorOf(ask(broken.engine))).code).toBe("ARL_OOM");
	});
});
