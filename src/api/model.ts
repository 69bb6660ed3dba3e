/** A model that answers: opened once, then any number of replies, one after the other. */
import type { ChatMessage } from "../data/sources/record.js";
import { chooseDevice } from "../device/index.js";
import { ArlError } from "../errors.js";
import { type FetchProgress, modelFolder } from "../hub/index.js";
import { loadNative, type NativeEngine, type NativeTextEncoder } from "../native.js";
import { generateText } from "../run/eval/generate-text.js";
import { endTokens, openForInference } from "../run/eval/inference.js";
import { parseReply } from "../run/eval/parse-reply.js";
import { checkTokenizer } from "../run/setup/preflight.js";
import { type ChatCompletion, type Completion, Reply } from "./reply.js";

/** How a model is opened. */
export interface ModelOptions {
	/** `auto` (default: a GPU where one can be used), `cpu`, `cuda` or `cuda:N`. */
	device?: string;
	/** Compute in bfloat16; `auto` (default): on a GPU. */
	bf16?: boolean | "auto";
	/** Threads that compute; absent: as many as the process may use. */
	threads?: number;
	/** Folder of an adapter (LoRA) of the model, which answers with it. */
	adapter?: string;
	/** Keep the weights of linear layers in 4 bits (NF4). A folder in NF4 is opened so in any case. */
	loadIn4bit?: boolean;
	/** With `loadIn4bit`: keep their scales in 8 bits. */
	nestedQuant?: boolean;
	/** A Jinja chat template's file that replaces the model's. */
	chatTemplate?: string;
	/** What happens to the reasoning in earlier replies; absent: what the template does. */
	thinking?: "keep" | "strip" | "last";
	/** Called as a model of the Hugging Face Hub is fetched. */
	onFetch?: (progress: FetchProgress) => void;
	/** Aborting it ends the fetching of a model with `ARL_INTERRUPTED`. */
	signal?: AbortSignal;
}

/** How text is generated. */
export interface GenerateOptions {
	/** Most new tokens; absent: 1024. Never beyond the model's `max_position_embeddings`. */
	maxNewTokens?: number;
	/** 0 (default): the most probable token always. Above 0: drawn from `softmax(logits / temperature)`. */
	temperature?: number;
	/** Draw from this many of the most probable tokens; absent: from all. */
	topK?: number;
	/** Draw from the fewest most probable tokens whose probabilities sum to this or more, above 0 and at most 1; absent: 1. */
	topP?: number;
	/** Seed of the draws: the same seed gives the same text. Absent: 42. */
	seed?: number;
	/** Texts that end the reply; they are no part of it. */
	stop?: string | readonly string[];
	/** Aborting it stops generation within a token; the reply fails with `ARL_INTERRUPTED`. */
	signal?: AbortSignal;
}

/** How a conversation is answered. */
export interface ChatOptions extends GenerateOptions {
	/** JSON schemas of the tools on offer, as rows have them. */
	tools?: readonly Record<string, unknown>[];
	/** More variables for the chat template, `{ enable_thinking: false }` for example. */
	chatTemplateKwargs?: Record<string, unknown>;
}

const MAX_NEW_TOKENS = 1024;
const SEED = 42;

/** What a model consists of once it is open. */
interface Parts {
	encoder: NativeTextEncoder;
	engine: NativeEngine;
	maxPositions: number;
	/** End tokens of the model, and those with which the chat template ends a reply. */
	endIds: number[];
	stopIds: number[];
	notices: string[];
}

/** A model in memory. Close it, or declare it with `await using`. */
export class Model {
	readonly #parts: Parts;
	readonly #closing = new AbortController();
	/** Resolves when the reply before has ended: the engine generates one at a time. */
	#idle: Promise<unknown> = Promise.resolve();
	#closed: Promise<void> | null = null;

	private constructor(parts: Parts) {
		this.#parts = parts;
	}

	/**
	 * Reads a model: a folder in Hugging Face's layout, or `OWNER/NAME` of the Hugging Face Hub.
	 *
	 * @throws ArlError where the folder holds no model that can be read, the memory does not suffice, or the device cannot be used.
	 */
	static async open(model: string, options: ModelOptions = {}): Promise<Model> {
		return new Model(await openParts(model, options));
	}

	/** What a user should know of how the model runs here. */
	get notices(): readonly string[] {
		return this.#parts.notices;
	}

	/** Continues a text, or tokens. Ends at the model's end tokens. */
	generate(prompt: string | ArrayLike<number>, options: GenerateOptions = {}): Reply<Completion> {
		const { encoder, endIds } = this.#parts;
		const ids = () => (typeof prompt === "string" ? encode(encoder, { text: prompt }) : Int32Array.from(prompt));
		return new Reply((push, signal) => this.#generate(ids, endIds, options, push, signal));
	}

	/** Replies to a conversation, rendered as in training, by the model's chat template. */
	chat(messages: readonly ChatMessage[], options: ChatOptions = {}): Reply<ChatCompletion> {
		const { encoder, endIds, stopIds } = this.#parts;
		const { tools, chatTemplateKwargs, ...others } = options;
		const prompt = () => {
			if (messages.at(-1)?.role === "assistant")
				throw new ArlError("ARL_USAGE", "the last message is the assistant's: there is nothing to reply to");
			const row = { messages, ...(tools && { tools }), chat_template_kwargs: chatTemplateKwargs };
			return encode(encoder, row, messages.length);
		};
		return new Reply(async (push, signal) => {
			const completion = await this.#generate(prompt, [...endIds, ...stopIds], others, push, signal);
			return { ...completion, message: parseReply(completion.text) };
		});
	}

	/** Stops the replies in progress and frees the memory. */
	close(): Promise<void> {
		this.#closing.abort();
		this.#closed ??= this.#idle.then(() => this.#parts.engine.close());
		return this.#closed;
	}

	[Symbol.asyncDispose](): Promise<void> {
		return this.close();
	}

	async #generate(
		prompt: () => Int32Array,
		endIds: readonly number[],
		options: GenerateOptions,
		push: (text: string) => void,
		left: AbortSignal,
	): Promise<Completion> {
		if (this.#closed !== null) throw new ArlError("ARL_USAGE", "the model is closed");
		const { encoder, engine, maxPositions } = this.#parts;
		const { maxNewTokens, stop, ...sampling } = checked(options);
		const ids = prompt();
		if (ids.length === 0) throw new ArlError("ARL_DATA", "the prompt is empty");
		const room = maxPositions - ids.length;
		if (room <= 0)
			throw new ArlError(
				"ARL_DATA",
				`the prompt has ${ids.length} tokens, and the model takes ${maxPositions}`,
				"Shorten the prompt, or the conversation.",
			);
		const signals = [left, this.#closing.signal, ...(options.signal ? [options.signal] : [])];
		const run = async () =>
			generateText({
				engine,
				decode: (tokens) => encoder.decode(tokens, true),
				prompt: ids,
				options: { maxNewTokens: Math.min(maxNewTokens, room), stopIds: [...endIds], ...sampling },
				stop,
				push,
				signal: AbortSignal.any(signals),
			});
		const result = this.#idle.then(run);
		this.#idle = result.catch(() => {});
		const { text, tokens, finishReason } = await result;
		return { text, tokens, finishReason, promptTokens: ids.length, completionTokens: tokens.length };
	}
}

async function openParts(name: string, options: ModelOptions): Promise<Parts> {
	const native = loadNative();
	const { onFetch, signal = null } = options;
	const found = await modelFolder(name, { weights: true, signal, ...(onFetch && { progress: onFetch }) });
	const dir = found.path;
	const model = { path: dir, ...native.modelConfig(dir) };
	const encoder = native.TextEncoder.open({
		modelDir: dir,
		truncation: "error",
		...(options.chatTemplate !== undefined && { chatTemplate: options.chatTemplate }),
		...(options.thinking !== undefined && { thinking: options.thinking }),
	});
	const text = encoder.info();
	checkTokenizer(model, text);
	const endIds = await endTokens(dir);
	const device = chooseDevice(options.device ?? "auto", native);
	const { bf16 = "auto", threads = null, adapter = null, loadIn4bit = false, nestedQuant = false } = options;
	const inference = { device, bf16, threads, adapter, loadIn4bit, nestedQuant };
	const engine = await openForInference(dir, inference, { maxTokens: 1, maxSequences: 1 });
	const { notice } = engine.info();
	const notices = [found.notice, device.notice, notice ?? null].filter((line) => line !== null);
	return { encoder, engine, maxPositions: model.maxPositionEmbeddings, endIds, stopIds: text.stopIds, notices };
}

function encode(encoder: NativeTextEncoder, row: Record<string, unknown>, until?: number): Int32Array {
	return encoder.prompt(Buffer.from(JSON.stringify(row)), until);
}

/** The options with their defaults. Throws `ARL_USAGE` for values that are out of range. */
function checked(options: GenerateOptions) {
	const { maxNewTokens = MAX_NEW_TOKENS, temperature = 0, topK = 0, topP = 1, seed = SEED, stop = [] } = options;
	const need = (name: string, value: unknown, holds: boolean, expected: string) => {
		if (!holds)
			throw new ArlError(
				"ARL_USAGE",
				`${name}: expected ${expected}, got ${typeof value === "number" ? value : JSON.stringify(value)}`,
			);
	};
	const whole = (value: number, low: number) => Number.isInteger(value) && value >= low && value < 2 ** 32;
	need("maxNewTokens", maxNewTokens, whole(maxNewTokens, 1), "a whole number of 1 or more");
	need("temperature", temperature, Number.isFinite(temperature) && temperature >= 0, "a number of 0 or more");
	need("topK", topK, whole(topK, 0), "a whole number of 0 or more");
	need("topP", topP, topP > 0 && topP <= 1, "a number above 0 and at most 1");
	need("seed", seed, whole(seed, 0), "a whole number of 0 or more");
	const stops = typeof stop === "string" ? [stop] : [...stop];
	need(
		"stop",
		stop,
		stops.every((text) => typeof text === "string" && text !== ""),
		"texts that are not empty",
	);
	return { maxNewTokens, temperature, topK, topP, seed, stop: stops };
}
