import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { run } from "../src/cli/generate.js";
import { ArlError } from "../src/errors.js";
import { Model } from "../src/index.js";
import type {
	EngineOptions,
	GenerateOptions,
	Native,
	NativeEngine,
	NativeTextEncoder,
	RowNote,
	TextOptions,
} from "../src/native.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf } from "./support/folder.js";
import { root } from "./support/real.js";

const STOP = 0;
const folder = mkdtempSync(join(tmpdir(), "arl-generate-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

type Row = { messages: { role: string; content: string }[] };
const parse = (row: Uint8Array) => JSON.parse(Buffer.from(row).toString()) as Row;
const bytesOf = (text: string) => [...Buffer.from(text)];

/** Bytes as tokens; a message is its text and STOP. */
const encoder: Pick<NativeTextEncoder, keyof NativeTextEncoder> = {
	info: () => ({ vocabSize: 256, stopIds: [STOP], templateSource: "fake", fingerprint: "fake" }),
	detect: () => "messages",
	encode: (row) => {
		const ids: number[] = [];
		const spans: { message: number; first: number; last: number }[] = [];
		for (const [message, { role, content }] of parse(row).messages.entries()) {
			const first = ids.length;
			if (content === "explode") throw new ArlError("ARL_DATA", "the row explodes");
			ids.push(...bytesOf(content), STOP);
			if (role === "assistant") spans.push({ message, first, last: ids.length - 1 });
		}
		const weights = new Float32Array(ids.length);
		return { text: "", inputIds: Int32Array.from(ids), weights, spans, images: [], notes: [] };
	},
	prompt: (row, until) =>
		Int32Array.from(
			parse(row)
				.messages.slice(0, until ?? undefined)
				.flatMap(({ content }) => [...bytesOf(content), STOP]),
		),
	promptRow: (row, until) => ({ inputIds: encoder.prompt(row, until), positions: new Int32Array(), images: [] }),
	imageRefs: () => [],
	decode: (ids) => Buffer.from([...ids]).toString(),
};

/** What the core notes of lists of images. */
function imageNotes(row: Uint8Array): RowNote[] {
	const note = (kind: string, count: number): RowNote => ({
		kind,
		subject: "",
		level: "info",
		message: "",
		rows: 1,
		count,
		firstRow: 0,
	});
	const lists = parse(row).messages.map(({ content }) => content as unknown);
	const images = lists.filter((content) => Array.isArray(content));
	return images.flatMap((list) => [note("dropped images", list.length), note("emptied messages", 1)]);
}

interface Seen {
	batches: number[];
	closed: number;
	options: GenerateOptions[];
	opened: EngineOptions[];
}

const nothing = (): Seen => ({ batches: [], closed: 0, options: [], opened: [] });

/** A model that answers with the last message it was given, as `answers` says. */
function core(answers: (model: string, last: string) => string, seen: Seen = nothing()) {
	const open = async (model: string) => ({
		generate: async (prompts: Int32Array[], options: GenerateOptions) => {
			seen.batches.push(prompts.length);
			seen.options.push(options);
			return prompts.map((prompt) => {
				const last =
					Buffer.from([...prompt])
						.toString()
						.split("\0")
						.at(-2) ?? "";
				const ids = [...bytesOf(answers(model, last)), STOP].slice(0, options.maxNewTokens);
				return Int32Array.from(ids);
			});
		},
		interrupt: () => {},
		close: async () => {
			seen.closed++;
		},
	});
	const native = {
		...fakeNative(),
		TextEncoder: {
			open: ({ images }: TextOptions): NativeTextEncoder => ({
				...encoder,
				encode: (row) => ({ ...encoder.encode(row), notes: images === "drop" ? imageNotes(row) : [] }),
			}),
		},
		Engine: {
			open: (options: EngineOptions) => {
				seen.opened.push(options);
				return open(options.modelDir) as unknown as Promise<NativeEngine>;
			},
		},
	};
	return () => native as unknown as Native;
}

const rows: Row[] = [
	{
		messages: [
			{ role: "user", content: "one" },
			{ role: "assistant", content: "ONE" },
		],
	},
	{
		messages: [
			{ role: "user", content: "two" },
			{ role: "assistant", content: "TWO" },
			{ role: "user", content: "three" },
			{ role: "assistant", content: "THREE" },
		],
	},
];
const file = join(folder, "rows.jsonl");
writeFileSync(file, rows.map((row) => `${JSON.stringify(row)}\n`).join(""));

let stdout = "";
beforeEach(() => {
	stdout = "";
	vi.stubEnv("NO_COLOR", "1");
	vi.spyOn(process.stdout, "write").mockImplementation((text) => {
		stdout += String(text);
		return true;
	});
	vi.spyOn(process.stderr, "write").mockImplementation(() => true);
});
afterEach(() => {
	vi.restoreAllMocks();
	vi.unstubAllEnvs();
});

const words = (...more: string[]) => ["--model_name_or_path", "before", "--prompt_file", file, ...more];
const lines = () =>
	stdout
		.trimEnd()
		.split("\n")
		.map((line) => JSON.parse(line) as Record<string, unknown>);

describe("arl generate", () => {
	it("asks for every trained reply with the row's own earlier replies, and counts rows and replies apart", async () => {
		const native = core((_, last) => (last === "three" ? "wrong" : last.toUpperCase()));
		expect(await run(words("--json"), native)).toBe(0);
		const answers = lines();
		expect(answers.slice(0, 3)).toMatchObject([
			{ message: 1, expected: "ONE", answer: "ONE", exact: true },
			{ message: 1, expected: "TWO", answer: "TWO", exact: true },
			{ message: 3, expected: "THREE", answer: "wrong", exact: false },
		]);
		expect(answers[1]?.location).toBe(`${file}:2`);
		expect(answers[3]).toMatchObject({ type: "score", rows: 2, exactRows: 1, replies: 3, exactReplies: 2 });
	});

	it("does not count an answer that was cut off where it would have gone on", async () => {
		const native = core((_, last) => last.toUpperCase() + (last === "one" ? "!" : ""));
		await run(words("--json", "--max_new_tokens", "3", "--limit", "1"), native);
		expect(lines()[0]).toMatchObject({ answer: "ONE", exact: false });
	});

	it("shows two models side by side and their shares", async () => {
		const native = core((model, last) => (model === "after" ? last.toUpperCase() : "?"));
		expect(await run(words("--compare", "after", "--examples", "1"), native)).toBe(0);
		expect(stdout).toContain("given    user: two");
		expect(stdout).toContain("differs  ?  (before)");
		expect(stdout).toContain("exact    TWO  (after)");
		expect(stdout).toContain("before  0.0 % of rows (0 of 2), 0.0 % of replies (0 of 3)");
		expect(stdout).toContain("after   100.0 % of rows (2 of 2), 100.0 % of replies (3 of 3)");
	});

	it("writes answers side by side in batches, bounded by the longest expected reply, and closes the engine", async () => {
		const seen = nothing();
		await run(
			words("--per_device_eval_batch_size", "2"),
			core((_, last) => last, seen),
		);
		expect(seen.batches).toEqual([2, 1]);
		expect(seen.closed).toBe(1);
		expect(seen.options[0]).toMatchObject({ maxNewTokens: "THREE".length + 1 + 8, stopIds: [STOP], temperature: 0 });
	});

	it("computes on the device that is asked for, in f32 on the CPU unless bf16 is said", async () => {
		const seen = nothing();
		const native = core((_, last) => last, seen);
		for (const more of [[], ["--device", "cpu", "--bf16"], ["--bf16", "true"], ["--bf16", "false"]])
			await run(words(...more), native);
		expect(seen.opened.map(({ device, dtype }) => `${device} ${dtype}`)).toEqual([
			"cpu f32",
			"cpu bf16",
			"cpu bf16",
			"cpu f32",
		]);
		const absent = await errorOf(run(words("--device", "cuda"), native));
		expect(absent).toMatchObject({ code: "ARL_DEVICE", message: "device cuda: no NVIDIA driver (libcuda.so.1)" });
		const wrong = await errorOf(run(words("--device", "tpu"), native));
		expect(wrong.code).toBe("ARL_USAGE");
		expect(wrong.message).toContain("expected auto, cpu, cuda or cuda:N");
	});

	it("names the row that cannot be used", async () => {
		const bad = join(folder, "bad.jsonl");
		writeFileSync(bad, '{"messages":[{"role":"assistant","content":"explode"}]}\n');
		const asked = run(
			["--model_name_or_path", "m", "--prompt_file", bad],
			core(() => ""),
		);
		await expect(asked).rejects.toMatchObject({ code: "ARL_DATA", message: `${bad}:1: the row explodes` });
	});

	it("refuses rows without a reply, wrong numbers and missing options", async () => {
		const none = join(folder, "none.jsonl");
		writeFileSync(none, '{"messages":[{"role":"user","content":"x"}]}\n');
		const native = core(() => "");
		await expect(run(["--model_name_or_path", "m", "--prompt_file", none], native)).rejects.toThrow(
			"no row has a trained reply",
		);
		await expect(run(words("--limit", "0"), native)).rejects.toMatchObject({ code: "ARL_USAGE" });
		await expect(run(words("--thinking", "hard"), native)).rejects.toMatchObject({ code: "ARL_USAGE" });
		await expect(run(["--prompt_file", file], native)).rejects.toThrow("--model_name_or_path");
		await expect(run(words("--columns", "x"), native)).rejects.toMatchObject({ code: "ARL_USAGE" });
	});

	it("leaves image parts out only where it is asked to, and says how many", async () => {
		const path = join(folder, "images.jsonl");
		const image = { type: "image_url", image_url: { url: "https://a.example/x.png" } };
		const messages = [
			{ role: "user", content: [image, image] },
			{ role: "user", content: "one" },
			{ role: "assistant", content: "ONE" },
		];
		writeFileSync(path, JSON.stringify({ messages }));
		let printed = "";
		vi.mocked(process.stderr.write).mockImplementation((text) => {
			printed += String(text);
			return true;
		});
		const options = ["--model_name_or_path", "before", "--prompt_file", path, "--compare", "after"];
		expect(
			await run(
				[...options, "--images", "drop"],
				core((_, last) => last.toUpperCase()),
			),
		).toBe(0);
		expect(printed).toContain("2 images of 1 row dropped (1 message is empty)");
		printed = "";
		await run(
			options,
			core((_, last) => last.toUpperCase()),
		);
		expect(printed).not.toContain("dropped");
	});
});

describe("arl generate --prompt", () => {
	const assets = join(root, "assets", "model");
	const prompt = (...more: string[]) => ["--model_name_or_path", assets, "--device", "cpu", "--prompt", ...more];

	it("writes the reply to a user's message as Model.chat generates it", async () => {
		await using model = await Model.open(assets, { device: "cpu" });
		const messages = [{ role: "user" as const, content: "Hello" }];
		const sampling = { maxNewTokens: 20, temperature: 0.9, topP: 0.8, topK: 30, seed: 5 };
		const expected = await model.chat(messages, sampling).completion();
		const flags = "--max_new_tokens 20 --temperature 0.9 --top_p 0.8 --top_k 30 --seed 5".split(" ");
		expect(await run(prompt("Hello", ...flags))).toBe(0);
		expect(stdout).toBe(`${expected.text}\n`);
		stdout = "";
		await run(prompt("Hello", "--json", ...flags));
		expect(lines()).toEqual([expected]);
	});

	it("begins the conversation with --system and --tools", async () => {
		const tools = [{ type: "function", function: { name: "add", parameters: { type: "object" } } }];
		const path = join(folder, "tools.json");
		writeFileSync(path, JSON.stringify(tools));
		await using model = await Model.open(assets, { device: "cpu" });
		const messages = ["system", "user"].map((role) => ({ role: role as "system" | "user", content: role }));
		const expected = await model.chat(messages, { tools, maxNewTokens: 9 }).completion();
		await run(prompt("user", "--system", "system", "--tools", path, "--max_new_tokens", "9", "--json"));
		expect(lines()).toEqual([expected]);
	});

	it("continues the very text with --raw, and says where it was cut off", async () => {
		let said = "";
		vi.mocked(process.stderr.write).mockImplementation((text) => {
			said += String(text);
			return true;
		});
		await using model = await Model.open(assets, { device: "cpu" });
		const { text } = await model.generate("The weather", { maxNewTokens: 3 }).completion();
		expect(await run(prompt("The weather", "--raw", "--max_new_tokens", "3"))).toBe(0);
		expect(stdout).toBe(`${text}\n`);
		expect(said).toBe("cut off after 3 tokens; --max_new_tokens sets the bound\n");
	});

	it.each([
		[[], "either --prompt TEXT or --prompt_file FILE"],
		[["--prompt", "a", "--prompt_file", "b"], "either --prompt TEXT or --prompt_file FILE"],
		[["--prompt", "a", "--compare", "b"], "--compare has no effect with --prompt"],
		[["--prompt", "a", "--raw", "--system", "b"], "--raw takes neither --system nor --tools"],
		[["--prompt", "a", "--raw", "--image", "b"], "--raw takes neither --system nor --tools nor --image"],
		[["--prompt_file", "a", "--image", "b"], "--image has no effect with --prompt_file"],
		[["--prompt_file", "a", "--raw"], "--raw has no effect with --prompt_file"],
		[["--prompt", "a", "--top_p", "0"], "--top_p: 0; expected a number, above 0 and at most 1"],
	])("refuses %j", async (more, message) => {
		const error = await errorOf(run(["--model_name_or_path", assets, ...more]));
		expect(error.code).toBe("ARL_USAGE");
		expect(error.message).toContain(message);
	});
});
