import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type ChatMessage, Model, type RecordData } from "../src/index.js";
import { loadNative } from "../src/native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { root, shared, sharedPath } from "./support/real.js";

const assets = join(root, "assets", "model");
const rows = readFileSync(join(root, "assets", "heldout.jsonl"), "utf8")
	.trim()
	.split("\n")
	.map((line) => JSON.parse(line) as RecordData);
const hello: ChatMessage[] = [{ role: "user", content: "Tell me about the weather in Rome." }];
const folder = temporaryFolder();

/** A copy of the model of `assets` with another `generation_config.json`; null: with none. */
function copyOf(name: string, generation: Record<string, unknown> | null): string {
	const copy = join(folder, name);
	mkdirSync(copy);
	for (const file of [
		"config.json",
		"model.safetensors",
		"tokenizer.json",
		"tokenizer_config.json",
		"chat_template.jinja",
	])
		copyFileSync(join(assets, file), join(copy, file));
	if (generation !== null) writeFileSync(join(copy, "generation_config.json"), JSON.stringify(generation));
	return copy;
}

/** A golden case with a tokenizer of as many words as its vocabulary has ids. */
function goldenModel(name: string): string {
	const model = join(folder, name);
	mkdirSync(model);
	for (const file of ["config.json", "model.safetensors"]) {
		copyFileSync(join(shared, "golden", name, file), join(model, file));
	}
	const { vocab_size } = JSON.parse(readFileSync(join(model, "config.json"), "utf8"));
	const vocab = Object.fromEntries(Array.from({ length: vocab_size }, (_, id) => [`w${id}`, id]));
	const tokenizer = { version: "1.0", added_tokens: [], model: { type: "WordLevel", vocab, unk_token: "w0" } };
	writeFileSync(join(model, "tokenizer.json"), JSON.stringify(tokenizer));
	writeFileSync(join(model, "tokenizer_config.json"), JSON.stringify({ eos_token: "w1" }));
	return model;
}

/** The tensors of a safetensors file that are 4 or 8 bytes a number. */
function tensors(path: string): Map<string, { shape: number[]; data: Float32Array | BigInt64Array }> {
	const bytes = readFileSync(path);
	const length = Number(bytes.readBigUInt64LE(0));
	const header = JSON.parse(bytes.toString("utf8", 8, 8 + length)) as Record<
		string,
		{ dtype: string; shape: number[]; data_offsets: [number, number] }
	>;
	delete header.__metadata__;
	return new Map(
		Object.entries(header).map(
			([
				name,
				{
					dtype,
					shape,
					data_offsets: [from, to],
				},
			]) => {
				const { buffer } = Uint8Array.from(bytes.subarray(8 + length + from, 8 + length + to));
				return [name, { shape, data: dtype === "I64" ? new BigInt64Array(buffer) : new Float32Array(buffer) }];
			},
		),
	);
}

describe.each(["qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-moe"])("the golden model %s", (name) => {
	it.skipIf(sharedPath(`golden/${name}`, "greedy tokens of transformers") === null)(
		"generates the token to which transformers gives the greatest logit, after every prefix",
		async () => {
			const place = join(shared, "golden", name);
			const batch = tensors(join(place, "batch.safetensors"));
			const ids = Array.from(batch.get("input_ids")?.data ?? [], Number);
			const bounds = Array.from(batch.get("cu_seqlens")?.data ?? [], Number);
			const { shape, data } = tensors(join(place, "forward.safetensors")).get("logits") ?? { shape: [], data: [] };
			const vocab = shape.at(-1) ?? 0;
			await using model = await Model.open(goldenModel(name), { device: "cpu", threads: 1 });
			let looked = 0;
			for (const [i, start] of bounds.slice(0, -1).entries()) {
				for (let at = start; at < (bounds[i + 1] ?? 0); at++) {
					const logits = Array.from(data.slice(at * vocab, (at + 1) * vocab), Number);
					const { tokens } = await model.generate(ids.slice(start, at + 1), { maxNewTokens: 1 }).completion();
					expect(tokens, `after ${at + 1 - start} tokens of sequence ${i}`).toEqual([
						logits.indexOf(Math.max(...logits)),
					]);
					looked++;
				}
			}
			expect(looked).toBe(ids.length);
		},
	);
});

describe("a model", () => {
	let model: Model;
	beforeAll(async () => {
		model = await Model.open(assets, { device: "cpu", threads: 1 });
	});
	afterAll(() => model.close());

	it("streams the text of the whole reply, and tells why it ended and how many tokens it took", async () => {
		const reply = model.chat(hello, { maxNewTokens: 60 });
		const parts: string[] = [];
		for await (const text of reply) parts.push(text);
		const whole = await reply.completion();
		expect(parts.join("")).toBe(whole.text);
		expect(parts.length).toBeGreaterThan(5);
		expect(whole.completionTokens).toBe(whole.tokens.length);
		expect(whole.message).toEqual({ role: "assistant", content: whole.text });
		expect(await model.chat(hello, { maxNewTokens: 60 }).completion()).toEqual(whole);
		const short = await model.chat(hello, { maxNewTokens: 4 }).completion();
		expect(short).toMatchObject({ finishReason: "length", tokens: whole.tokens.slice(0, 4) });
	});

	it("is prompted with the tokens that training has before a reply, tools included", async () => {
		const encoder = loadNative().TextEncoder.open({ modelDir: assets, truncation: "error" });
		const engine = await loadNative().Engine.open({
			modelDir: assets,
			device: "cpu",
			dtype: "f32",
			recompute: "block",
			maxTokens: 1,
			maxSequences: 1,
			adamBeta1: 0.9,
			adamBeta2: 0.999,
			adamEpsilon: 1e-8,
			weightDecay: 0,
			inferenceOnly: true,
		});
		for (const { messages, tools } of rows.slice(0, 4)) {
			const bytes = Buffer.from(JSON.stringify({ messages, tools }));
			const { spans, inputIds } = encoder.encode(bytes);
			for (const { message, first } of spans) {
				const options = { maxNewTokens: 8, ...(tools && { tools }) };
				const reply = await model.chat(messages.slice(0, message), options).completion();
				expect(reply.promptTokens).toBe(first);
				const raw = { maxNewTokens: 8, stopIds: encoder.info().stopIds };
				const [expected] = await engine.generate([inputIds.slice(0, first)], raw);
				expect(reply.tokens).toEqual([...(expected ?? [])]);
			}
		}
		await engine.close();
	});

	it("draws the same text for the same seed, and another for another", async () => {
		const draw = async (seed: number, more: object = {}) =>
			(await model.chat(hello, { maxNewTokens: 24, temperature: 1.2, seed, ...more }).completion()).text;
		expect(await draw(1)).toBe(await draw(1));
		expect(await draw(1)).not.toBe(await draw(2));
		const greedy = (await model.chat(hello, { maxNewTokens: 24 }).completion()).text;
		expect(await draw(1, { topK: 1 })).toBe(greedy);
		expect(await draw(1, { topP: 1e-6 })).toBe(greedy);
	});

	it("ends before a stop text", async () => {
		const { text } = await model.chat(hello, { maxNewTokens: 40 }).completion();
		const stop = text.slice(9, 12);
		const reply = model.chat(hello, { maxNewTokens: 40, stop: [stop, "never said"] });
		let streamed = "";
		for await (const part of reply) streamed += part;
		expect(streamed).toBe(text.slice(0, text.indexOf(stop)));
		expect(await reply.completion()).toMatchObject({ text: streamed, finishReason: "stop" });
		expect((await model.chat(hello, { maxNewTokens: 40 }).completion()).text).toBe(text);
	});

	it("stops within a token where its signal is aborted, and where the loop is left", async () => {
		await using endless = await Model.open(copyOf("endless", { eos_token_id: [] }), { device: "cpu", threads: 1 });
		const long = { maxNewTokens: 900 };
		const whole = await endless.generate("a", long).completion();
		expect(whole.completionTokens).toBe(900);
		const controller = new AbortController();
		const seen: string[] = [];
		const reply = endless.generate("a", { ...long, signal: controller.signal });
		const error = await errorOf(async () => {
			for await (const text of reply) {
				seen.push(text);
				if (seen.length === 3) controller.abort();
			}
		});
		expect(error.code).toBe("ARL_INTERRUPTED");
		// Those that were on their way when the signal fired.
		expect(seen.length).toBeLessThan(50);
		expect((await errorOf(reply.completion())).code).toBe("ARL_INTERRUPTED");
		const left = endless.generate("a", long);
		for await (const _ of left) break;
		expect((await errorOf(left.completion())).code).toBe("ARL_INTERRUPTED");
		expect(await endless.generate("a", long).completion()).toEqual(whole);
	});

	it("answers replies that are asked for at once one after the other, and stops only the one that is meant", async () => {
		const alone = await model.chat(hello, { maxNewTokens: 30 }).completion();
		const controller = new AbortController();
		const first = model.chat(hello, { maxNewTokens: 30 }).completion();
		const second = errorOf(model.chat(hello, { maxNewTokens: 30, signal: controller.signal }).completion());
		const third = model.chat(hello, { maxNewTokens: 30 }).completion();
		controller.abort();
		expect(await first).toEqual(alone);
		expect((await second).code).toBe("ARL_INTERRUPTED");
		expect(await third).toEqual(alone);
	});

	it.each([
		[{ maxNewTokens: 0 }, "maxNewTokens: expected a whole number of 1 or more, got 0"],
		[{ temperature: -1 }, "temperature: expected a number of 0 or more, got -1"],
		[{ temperature: Number.NaN }, "temperature: expected a number of 0 or more, got NaN"],
		[{ topP: 0 }, "topP: expected a number above 0 and at most 1, got 0"],
		[{ topK: 1.5 }, "topK: expected a whole number of 0 or more, got 1.5"],
		[{ seed: -3 }, "seed: expected a whole number of 0 or more, got -3"],
		[{ stop: ["a", ""] }, 'stop: expected texts that are not empty, got ["a",""]'],
	])("refuses %j", async (options, message) => {
		expect(await errorOf(model.generate("a", options).completion())).toMatchObject({ code: "ARL_USAGE", message });
	});

	it("refuses prompts that it cannot read", async () => {
		const refused = async (messages: unknown) => {
			const { code, message } = await errorOf(model.chat(messages as ChatMessage[]).completion());
			return `${code} ${message}`;
		};
		expect(await refused([])).toBe("ARL_DATA no messages: the list is empty");
		expect(await refused([...hello, { role: "assistant", content: "yes" }])).toContain("nothing to reply to");
		expect(await refused([{ role: "wizard", content: "x" }])).toContain("wizard");
		const image = [{ type: "image_url", image_url: { url: "https://a.example/x.png" } }];
		expect(await refused([{ role: "user", content: image }])).toContain("image");
		expect((await errorOf(model.generate([]).completion())).message).toBe("the prompt is empty");
		expect((await errorOf(model.generate([1, 99_999]).completion())).message).toContain("99999");
		const words = "weather ".repeat(3000);
		expect((await errorOf(model.generate(words).completion())).message).toMatch(
			/the prompt has \d+ tokens, and the model/,
		);
	});

	it("can be read once, and awaited as often as one likes", async () => {
		const reply = model.generate("a", { maxNewTokens: 3 });
		for await (const _ of reply);
		await expect(async () => {
			for await (const _ of reply);
		}).rejects.toThrow("read already");
		expect(await reply.completion()).toEqual(await reply.completion());
	});
});

describe("the end of a reply", () => {
	it("is each token that generation_config.json names, else config.json; a chat's is the template's too", async () => {
		const greedy = async (dir: string) => {
			await using model = await Model.open(dir, { device: "cpu", threads: 1 });
			const { tokens, finishReason } = await model.generate("The weather", { maxNewTokens: 20 }).completion();
			return { tokens, finishReason };
		};
		const free = await greedy(copyOf("free", { eos_token_id: [] }));
		expect(free.finishReason).toBe("length");
		const third = free.tokens[2] as number;
		const until = free.tokens.slice(0, free.tokens.indexOf(third));
		expect(await greedy(copyOf("third", { eos_token_id: [third, 1019] }))).toEqual({
			tokens: until,
			finishReason: "stop",
		});
		const plain = copyOf("config", null);
		const config = JSON.parse(readFileSync(join(plain, "config.json"), "utf8"));
		writeFileSync(join(plain, "config.json"), JSON.stringify({ ...config, eos_token_id: third }));
		expect(await greedy(plain)).toEqual({ tokens: until, finishReason: "stop" });
		writeFileSync(join(plain, "generation_config.json"), '{"eos_token_id": "none"}');
		const error = await errorOf(Model.open(plain));
		expect(error.message).toBe(
			`${join(plain, "generation_config.json")}: eos_token_id is "none"; expected a token id or a list of them`,
		);
	});
});

describe("a model that is closed", () => {
	it("stops its reply, and takes no other", async () => {
		const model = await Model.open(copyOf("closing", { eos_token_id: [] }), { device: "cpu", threads: 1 });
		const reply = model.generate("a", { maxNewTokens: 900 });
		const ended = errorOf(async () => {
			for await (const _ of reply) void model.close();
		});
		expect((await ended).code).toBe("ARL_INTERRUPTED");
		await model.close();
		expect(await errorOf(model.chat(hello).completion())).toMatchObject({
			code: "ARL_USAGE",
			message: "the model is closed",
		});
	});
});
