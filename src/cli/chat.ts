/** `arl chat`: a conversation with a model, in a terminal or line by line from a pipe. */
import { createInterface, type Interface } from "node:readline";
import pc from "picocolors";
import type { ChatOptions, Model } from "../api/model.js";
import type { ChatCompletion, Reply } from "../api/reply.js";
import { integer } from "../config/index.js";
import type { ChatMessage } from "../data/sources/record.js";
import { ArlError, formatError, toArlError } from "../errors.js";
import { liveLine } from "../report/live.js";
import { isTerminal, modelText, wantsColor } from "../report/terminal.js";
import { parseCommand } from "./command.js";
import { fetchingOn } from "./fetching.js";
import { CHAT_FLAGS, chatOptions, MODEL_FLAGS, modelOptions, SAMPLING_FLAGS, userMessage } from "./model-flags.js";

export const COMMAND = {
	name: "arl chat",
	usage: "DIR [--OPTION VALUE ...]",
	about: `Chats with the model in DIR: each line is a message, rendered with those before it by the model's chat template, as in
training. From a pipe it reads one message per line. Where a reply calls tools, the next lines are their results.

  /image FILE  attach an image, or one of a URL, to the next message (for a model with a vision tower)
  /reset       start a new conversation
  /exit        leave, as Ctrl-D does
  Ctrl-C       stop the reply; at the prompt, leave`,
	words: { noun: "the model's folder", least: 1, most: 1 },
	flags: {
		...CHAT_FLAGS,
		max_new_tokens: integer({ min: 1, default: 1024, description: "Most tokens of a reply." }),
		...SAMPLING_FLAGS,
		...MODEL_FLAGS,
	},
};

/** Opens a model; only tests give another one. */
type Open = (...given: Parameters<typeof Model.open>) => Promise<Pick<Model, "chat" | "close" | "notices">>;
const openModel: Open = async (...given) => (await import("../api/model.js")).Model.open(...given);

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[], open: Open = openModel): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const { flags } = given;
	const [dir = ""] = given.words;
	const { system, options } = await chatOptions(flags);
	const live = liveLine(process.stderr);
	live?.show([{ text: `opening ${dir}`, keep: 0 }]);
	const model = await open(dir, { ...modelOptions(flags), onFetch: fetchingOn(live) }).finally(() => live?.clear());
	try {
		for (const notice of model.notices) process.stderr.write(`${notice}\n`);
		await converse(new Conversation(model, options, system));
		return 0;
	} finally {
		await model.close();
	}
}

/** The messages so far, and the tool calls whose results are still to come. */
class Conversation {
	#messages: ChatMessage[];
	/** Images of the next message: files or URLs. */
	#images: string[] = [];
	#calls: string[] = [];
	#turns = 0;
	readonly #model: Pick<Model, "chat">;
	readonly #options: ChatOptions;
	readonly #system: readonly ChatMessage[];

	constructor(model: Pick<Model, "chat">, options: ChatOptions, system: readonly ChatMessage[]) {
		this.#model = model;
		this.#options = options;
		this.#system = system;
		this.#messages = [...system];
	}

	/** The name of the tool whose result comes next; null: the user's message does. */
	get tool(): string | null {
		return this.#calls[0] ?? null;
	}

	reset(): void {
		this.#messages = [...this.#system];
		this.#calls = [];
		this.#images = [];
	}

	/** Attaches an image to the next message. Throws where it is a file that is no image. */
	async attach(image: string): Promise<void> {
		await userMessage("", [image]);
		this.#images.push(image);
	}

	/** Adds a message, or a tool's result; gives the reply, or null where more results are to come. */
	async say(text: string, signal: AbortSignal): Promise<Reply<ChatCompletion> | null> {
		const name = this.#calls.shift();
		if (name === undefined) this.#messages.push(await userMessage(text, this.#images.splice(0)));
		else this.#messages.push({ role: "tool", name, content: text });
		if (this.#calls.length > 0) return null;
		// Each turn draws again, and the same seed gives the same conversation.
		const seed = (this.#options.seed ?? 0) + this.#turns++;
		return this.#model.chat([...this.#messages], { ...this.#options, seed, signal });
	}

	add(reply: ChatMessage): void {
		this.#messages.push(reply);
		this.#calls = (reply.tool_calls ?? []).map((call) => call.function.name);
	}

	/** Takes back what was said since the last reply, which got none. */
	takeBack(): void {
		while (["user", "tool"].includes(this.#messages.at(-1)?.role ?? "")) this.#messages.pop();
		const last = this.#messages.at(-1);
		this.#calls = (last?.tool_calls ?? []).map((call) => call.function.name);
	}
}

/** Reads messages and writes replies until the input ends. Throws what a reply failed with, except in a terminal. */
async function converse(conversation: Conversation): Promise<void> {
	const interactive = isTerminal(process.stdin);
	const { dim, bold } = pc.createColors(wantsColor(process.stderr));
	// The prompt is no part of the output: `arl chat DIR > replies.txt` holds replies alone.
	const lines = createInterface({ input: process.stdin, output: process.stderr, terminal: interactive });
	let stop: AbortController | null = null;
	lines.on("SIGINT", () => {
		if (stop === null) lines.close();
		else stop.abort();
	});
	const note = (text: string) => process.stderr.write(`${dim(text)}\n`);
	if (interactive) note("Type a message; /reset starts a new conversation, /exit leaves.");
	const next = reader(lines);
	for (;;) {
		const { tool } = conversation;
		const line = await next(interactive ? bold(tool === null ? "> " : `result of ${tool}> `) : "");
		if (line === null && interactive) process.stderr.write("\n");
		// Nobody reads the replies where stdout has failed (`arl chat DIR < prompts.txt | head`).
		if (line === null || line === "/exit" || process.stdout.errored) break;
		if (line === "/reset") {
			conversation.reset();
			if (interactive) note("new conversation");
			continue;
		}
		const image = /^\/image +(\S.*)$/.exec(line)?.[1]?.trim();
		if (image !== undefined) {
			try {
				await conversation.attach(image);
				if (interactive) note(`${image} goes with the next message`);
			} catch (error) {
				if (!interactive) throw error;
				process.stderr.write(formatError(toArlError(error), { color: wantsColor(process.stderr) }));
			}
			continue;
		}
		if (/^\/\w+$/.test(line) && interactive) {
			note(`${line} is no command; /image FILE, /reset and /exit are`);
			continue;
		}
		if (line.trim() === "" && tool === null) continue;
		stop = new AbortController();
		try {
			await answer(conversation, line, stop.signal, note);
		} catch (error) {
			if (!interactive) throw error;
			conversation.takeBack();
			process.stderr.write(formatError(toArlError(error), { color: wantsColor(process.stderr) }));
		} finally {
			stop = null;
		}
	}
	lines.close();
}

/** Writes the reply to a message as it comes. What was written of a reply that is stopped stays a part of the conversation. */
async function answer(
	conversation: Conversation,
	line: string,
	signal: AbortSignal,
	note: (text: string) => void,
): Promise<void> {
	const reply = await conversation.say(line, signal);
	if (reply === null) return;
	let written = "";
	try {
		for await (const text of reply) {
			process.stdout.write(modelText(text, process.stdout));
			written += text;
		}
		const { message, finishReason, completionTokens } = await reply.completion();
		process.stdout.write("\n");
		conversation.add(message);
		if (finishReason === "length") note(`cut off after ${completionTokens} tokens; --max_new_tokens sets the bound`);
	} catch (error) {
		if (written !== "") process.stdout.write("\n");
		if (!(error instanceof ArlError && signal.aborted)) throw error;
		note("stopped");
		if (written === "") conversation.takeBack();
		else conversation.add({ role: "assistant", content: written });
	}
}

/** A function that shows a prompt and gives the next line; null at the end of the input. Lines that come early wait. */
function reader(lines: Interface): (prompt: string) => Promise<string | null> {
	const early: string[] = [];
	let ended = false;
	let wake = () => {};
	lines.on("line", (line) => {
		early.push(line);
		// A long file is not read into memory whole.
		if (early.length >= 1000) lines.pause();
		wake();
	});
	lines.on("close", () => {
		ended = true;
		wake();
	});
	return async (prompt) => {
		if (early.length === 0 && !ended) {
			lines.resume();
			lines.setPrompt(prompt);
			if (prompt !== "") lines.prompt();
			await new Promise<void>((resolve) => {
				wake = resolve;
			});
		}
		return early.shift() ?? null;
	};
}
