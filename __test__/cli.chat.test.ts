import { spawnSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { Readable } from "node:stream";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { Reply } from "../src/api/reply.js";
import { run } from "../src/cli/chat.js";
import { ArlError, type ChatCompletion, type ChatMessage, type ChatOptions, Model } from "../src/index.js";
import { parseReply } from "../src/run/eval/parse-reply.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();
const assets = join(root, "assets", "model");

let stdout = "";
let stderr = "";
beforeEach(() => {
	stdout = "";
	stderr = "";
	vi.stubEnv("NO_COLOR", "1");
	for (const name of ["stdout", "stderr"] as const) {
		vi.spyOn(process[name], "write").mockImplementation((text) => {
			if (name === "stdout") stdout += String(text);
			else stderr += String(text);
			return true;
		});
	}
});
afterEach(() => {
	vi.restoreAllMocks();
	vi.unstubAllEnvs();
});

/** What a model was asked, and whether it was closed. */
interface Seen {
	chats: { messages: readonly ChatMessage[]; options: ChatOptions }[];
	closed: number;
}

/** A model whose replies a test writes; of an error it fails. */
function scripted(replies: (string | ArlError)[], seen: Seen = { chats: [], closed: 0 }) {
	const chat = (messages: readonly ChatMessage[], { signal: _, ...options }: ChatOptions = {}) => {
		seen.chats.push({ messages, options });
		const text = replies.shift() ?? "";
		return new Reply<ChatCompletion>(async (push) => {
			if (text instanceof ArlError) throw text;
			push(text);
			const message = parseReply(text);
			return { text, tokens: [], finishReason: "stop", promptTokens: 1, completionTokens: 0, message };
		});
	};
	return async () => ({ chat, notices: ["a notice"], close: async () => void seen.closed++ });
}

/** Runs the command with lines from a pipe. */
function piped(lines: string[], words: string[], open: Parameters<typeof run>[1]) {
	const input = Readable.from(lines.map((line) => `${line}\n`));
	vi.spyOn(process, "stdin", "get").mockReturnValue(input as unknown as typeof process.stdin);
	return run(["dir", ...words], open);
}

const CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>';

describe("arl chat with lines from a pipe", () => {
	it("sends images with the next message, files as their content, and refuses a file that is none", async () => {
		const file = join(folder, "dot.gif");
		const gif = "R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs=";
		writeFileSync(file, Buffer.from(gif, "base64"));
		const seen: Seen = { chats: [], closed: 0 };
		const url = "https://host.example/x.png";
		await piped([`/image ${file}`, `/image ${url}`, "What?", "And now?"], [], scripted(["1", "2"], seen));
		const [first, second] = seen.chats.map(({ messages }) => messages);
		expect(first?.[0]?.content).toEqual([
			{ type: "image_url", image_url: { url: `data:image/gif;base64,${gif}` } },
			{ type: "image_url", image_url: { url } },
			{ type: "text", text: "What?" },
		]);
		expect(second?.at(-1)?.content).toBe("And now?");
		writeFileSync(join(folder, "words.txt"), "words");
		const error = await errorOf(piped([`/image ${join(folder, "words.txt")}`], [], scripted([])));
		expect(error.message).toContain("not a supported image: this is text");
	});

	it("replies to each line with those before it, in one conversation until /reset", async () => {
		const seen: Seen = { chats: [], closed: 0 };
		const words = ["--system", "Be brief.", "--max_new_tokens", "7", "--temperature", "0.5", "--seed", "3"];
		const code = await piped(
			["one", "", "two", "/reset", "three", "/exit", "four"],
			words,
			scripted(["1", "2", "3"], seen),
		);
		expect(code).toBe(0);
		expect(stdout).toBe("1\n2\n3\n");
		expect(stderr).toBe("a notice\n");
		const system = { role: "system", content: "Be brief." };
		const user = (content: string) => ({ role: "user", content });
		const assistant = (content: string) => ({ role: "assistant", content });
		expect(seen.chats.map(({ messages }) => messages)).toEqual([
			[system, user("one")],
			[system, user("one"), assistant("1"), user("two")],
			[system, user("three")],
		]);
		const options = { maxNewTokens: 7, temperature: 0.5, topK: 0, topP: 1 };
		expect(seen.chats.map((chat) => chat.options)).toEqual([3, 4, 5].map((seed) => ({ ...options, seed })));
		expect(seen.closed).toBe(1);
	});

	it("takes the results of tool calls from the next lines, with the tools of a file", async () => {
		const tools = [{ type: "function", function: { name: "add", parameters: { type: "object" } } }];
		const file = join(folder, "tools.json");
		writeFileSync(file, JSON.stringify(tools));
		const seen: Seen = { chats: [], closed: 0 };
		await piped(["add", "2", "", "thanks"], ["--tools", file], scripted([`${CALL}\n${CALL}`, "four", "yes"], seen));
		expect(seen.chats.map(({ options }) => options.tools)).toEqual([tools, tools, tools]);
		const [, second, third] = seen.chats.map(({ messages }) => messages);
		expect(second?.slice(1)).toEqual([
			parseReply(`${CALL}\n${CALL}`),
			{ role: "tool", name: "add", content: "2" },
			{ role: "tool", name: "add", content: "" },
		]);
		expect(third?.slice(-2)).toEqual([
			{ role: "assistant", content: "four" },
			{ role: "user", content: "thanks" },
		]);
	});

	it("ends with what a reply failed with, and closes the model", async () => {
		const seen: Seen = { chats: [], closed: 0 };
		const error = await errorOf(piped(["one", "two"], [], scripted([new ArlError("ARL_DATA", "too long")], seen)));
		expect(error.code).toBe("ARL_DATA");
		expect(seen).toMatchObject({ chats: { length: 1 }, closed: 1 });
	});

	it("reads a file of more lines than it holds at a time", async () => {
		const lines = Array.from({ length: 2500 }, (_, i) => String(i));
		expect(await piped(lines, [], scripted([...lines]))).toBe(0);
		expect(stdout).toBe(lines.map((line) => `${line}\n`).join(""));
	});

	it.each([
		["{}", "expected a list of tools"],
		['["add"]', "expected a list of tools"],
		["[", "not JSON"],
	])("refuses the tools %s", async (text, message) => {
		const file = join(folder, "bad.json");
		writeFileSync(file, text);
		const error = await errorOf(piped([], ["--tools", file], scripted([])));
		expect(error).toMatchObject({ code: "ARL_CONFIG" });
		expect(error.message).toContain(`${file}: ${message}`);
	});
});

const PYTHON = process.env.ARL_PYTHON ?? "python3";
const hasTerminals = spawnSync(PYTHON, ["-c", "import pty; pty.openpty()"]).status === 0;
if (!hasTerminals) process.stderr.write(`SKIPPED: arl chat in a terminal: ${PYTHON} cannot open one\n`);

/** Chats in a terminal: each text is awaited, then the keys are typed. */
function talk(steps: [text: string, keys: string][], words: string[] = []) {
	const command = [process.execPath, join(root, "dist", "cli", "main.js"), "chat", assets, "--device", "cpu", ...words];
	const script = join(root, "__test__", "support", "talk.py");
	const env = { ...process.env, NO_COLOR: "1", TERM: "xterm" };
	const done = spawnSync(PYTHON, [script, JSON.stringify(steps), ...command], { encoding: "utf8", env, cwd: root });
	expect(done.status, done.stderr).toBe(0);
	return JSON.parse(done.stdout) as { code: number | null; signal: string | null; shown: string };
}

describe.skipIf(!hasTerminals)("arl chat in a terminal", () => {
	it("shows a prompt, the reply as it comes, and leaves at Ctrl-D", async () => {
		await using model = await Model.open(assets, { device: "cpu" });
		const { text } = await model.chat([{ role: "user", content: "hi" }], { maxNewTokens: 12 }).completion();
		const { code, shown } = talk(
			[
				["> ", "hi\r"],
				["cut off after 12 tokens", "/help\r"],
				["/help is no command", "\u0004"],
			],
			["--max_new_tokens", "12"],
		);
		expect(code).toBe(0);
		expect(shown).toContain(text.replaceAll("\n", "\r\n"));
	});

	it("stops a reply at Ctrl-C and goes back to the prompt, where Ctrl-C leaves", () => {
		const endless = ["--max_new_tokens", "100000", "--temperature", "3"];
		const { code, shown } = talk(
			[
				["> ", "hi\r"],
				["hi\r\r\n", "\u0003"],
				["stopped", ""],
				["> ", "\u0003"],
			],
			endless,
		);
		expect(code, shown).toBe(0);
	});

	it("shows why a reply failed, and takes another message", () => {
		const { code, shown } = talk([
			["> ", `${"word ".repeat(700)}\r`],
			["what to do", "/reset\r"],
			["new conversation", "/exit\r"],
		]);
		expect(code, shown).toBe(0);
		expect(shown).toMatch(/ARL_DATA the prompt has \d+ tokens, and the model takes 2048/);
	});
});
