/** A model that answers: opened once, then any number of replies, one after the other. */
import { join } from "node:path";
import { IMAGE_DEFAULTS } from "../config/image-defaults.js";
import type { ChatMessage } from "../data/sources/record.js";
import { rowImage } from "../data/tokens/pictures.js";
import { chooseDevice } from "../device/index.js";
import { exists } from "../disk/folders.js";
import { ArlError } from "../errors.js";
import { type FetchProgress, modelFolder } from "../hub/index.js";
import { loadNative, type NativeEngine, type NativeTextEncoder } from "../native.js";
import { generateText } from "../run/eval/generate-text.js";
import { endTokens, openForInference } from "../run/eval/inference.js";
import { parseReply } from "../run/eval/parse-reply.js";
import { promptOf } from "../run/eval/prompts.js";
import type { SeenPrompt } from "../run/eval/seen-prompts.js";
import { trainText } from "../run/setup/encoder.js";
import { readModelFacts } from "../run/setup/model.js";
import { checkTokenizer } from "../run/setup/preflight.js";
import { openVision, type Vision, type VisionOptions } from "../run/setup/vision.js";
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
	/** How images of messages are loaded and resized, for a model with a vision tower; names are those of options of a run. */
	images?: Partial<Omit<VisionOptions, "images">>;
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
	/** Null: the model reads text only. */
	vision: Vision | null;
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
		const read = async () => {
			const ids = typeof prompt === "string" ? encoder.prompt(bytesOf({ text: prompt })) : Int32Array.from(prompt);
			return { inputIds: ids, positions: new Int32Array(), images: [] };
		};
		return new Reply((push, signal) => this.#generate(read, endIds, options, push, signal));
	}

	/** Replies to a conversation, rendered as in training, by the model's chat template. */
	chat(messages: readonly ChatMessage[], options: ChatOptions = {}): Reply<ChatCompletion> {
		const { endIds, stopIds } = this.#parts;
		const { tools, chatTemplateKwargs, ...others } = options;
		const prompt = async () => {
			if (messages.at(-1)?.role === "assistant")
				throw new ArlError("ARL_USAGE", "the last message is the assistant's: there is nothing to reply to");
			const row = { messages, ...(tools && { tools }), chat_template_kwargs: chatTemplateKwargs };
			return readPrompt(this.#parts, row, messages.length);
		};
		return new Reply(async (push, signal) => {
			const completion = await this.#generate(prompt, [...endIds, ...stopIds], others, push, signal);
			return { ...completion, message: parseReply(completion.text) };
		});
	}

	/** Stops the replies in progress and frees the memory. */
	close(): Promise<void> {
		this.#closing.abort();
		this.#closed ??= this.#idle.then(async () => {
			await this.#parts.vision?.close();
			await this.#parts.engine.close();
		});
		return this.#closed;
	}

	[Symbol.asyncDispose](): Promise<void> {
		return this.close();
	}

	async #generate(
		prompt: () => Promise<SeenPrompt>,
		endIds: readonly number[],
		options: GenerateOptions,
		push: (text: string) => void,
		left: AbortSignal,
	): Promise<Completion> {
		if (this.#closed !== null) throw new ArlError("ARL_USAGE", "the model is closed");
		const { encoder, engine, maxPositions } = this.#parts;
		const { maxNewTokens, stop, ...sampling } = checked(options);
		const signals = [left, this.#closing.signal, ...(options.signal ? [options.signal] : [])];
		// Read at once, while the reply before is still being generated.
		const reading = prompt();
		reading.catch(() => {});
		const run = async () => {
			const seen = await reading;
			const ids = seen.inputIds;
			if (ids.length === 0) throw new ArlError("ARL_DATA", "the prompt is empty");
			const room = maxPositions - ids.length;
			if (room <= 0)
				throw new ArlError(
					"ARL_DATA",
					`the prompt has ${ids.length} tokens, and the model takes ${maxPositions}`,
					"Shorten the prompt, or the conversation.",
				);
			const generated = await generateText({
				engine,
				decode: (tokens) => encoder.decode(tokens, true),
				prompt: seen,
				options: { maxNewTokens: Math.min(maxNewTokens, room), stopIds: [...endIds], ...sampling },
				stop,
				push,
				signal: AbortSignal.any(signals),
			});
			return { ...generated, promptTokens: ids.length };
		};
		const result = this.#idle.then(run);
		this.#idle = result.catch(() => {});
		const { text, tokens, finishReason, promptTokens } = await result;
		return { text, tokens, finishReason, promptTokens, completionTokens: tokens.length };
	}
}

async function openParts(name: string, options: ModelOptions): Promise<Parts> {
	const native = loadNative();
	const { onFetch, signal = null } = options;
	const found = await modelFolder(name, { weights: true, signal, ...(onFetch && { progress: onFetch }) });
	const dir = found.path;
	const model = await readModelFacts(dir, native);
	const vision = openVision({
		native,
		options: { ...VISION_DEFAULTS, ...options.images },
		model,
		cacheDir: null,
		signal: options.signal ?? null,
	});
	const text = { modelDir: dir, truncation: "error" as const };
	// A folder of a model that sees may lack what prepares images: it then reads text.
	const seeing = vision !== null && (await hasProcessor(dir)) ? vision : null;
	const encoder = native.TextEncoder.open({
		...(seeing === null ? text : trainText(text, seeing)),
		...(options.chatTemplate !== undefined && { chatTemplate: options.chatTemplate }),
		...(options.thinking !== undefined && { thinking: options.thinking }),
	});
	const info = encoder.info();
	checkTokenizer(model, info);
	const endIds = await endTokens(dir);
	const device = chooseDevice(options.device ?? "auto", native);
	const { bf16 = "auto", threads = null, adapter = null, loadIn4bit = false, nestedQuant = false } = options;
	const inference = { device, bf16, threads, adapter, loadIn4bit, nestedQuant };
	const engine = await openForInference(dir, inference, { maxTokens: 1, maxSequences: 1 }, seeing !== null);
	const { notice } = engine.info();
	const notices = [found.notice, device.notice, notice ?? null].filter((line) => line !== null);
	const parts = { encoder, engine, maxPositions: model.maxPositionEmbeddings, endIds, stopIds: info.stopIds };
	return { ...parts, notices, vision: seeing };
}

async function hasProcessor(dir: string): Promise<boolean> {
	const files = ["preprocessor_config.json", "processor_config.json"].map((name) => exists(join(dir, name)));
	return (await Promise.all(files)).includes(true);
}

/** Images come from where rows' images come from, unless the caller says otherwise. */
const VISION_DEFAULTS = {
	images: "auto",
	min_pixels: null,
	max_pixels: null,
	image_root: null,
	image_allow_private: false,
	...IMAGE_DEFAULTS,
	image_cache_dir: null,
} as const;

function bytesOf(row: Record<string, unknown>): Uint8Array {
	return Buffer.from(JSON.stringify(row));
}

/** The tokens of a conversation before its message `until`, and the pixels of its images. */
async function readPrompt(
	{ encoder, vision }: Pick<Parts, "encoder" | "vision">,
	row: Record<string, unknown>,
	until: number,
): Promise<SeenPrompt> {
	const bytes = bytesOf(row);
	const loader = vision?.loaderOf(encoder) ?? null;
	const measured = (await loader?.measure(bytes)) ?? [];
	const prompt = promptOf(encoder, bytes, until, measured.map(rowImage));
	return { ...prompt, images: (await loader?.prepare(bytes, prompt.images)) ?? [] };
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
