/**
 * Generates the trained replies of rows, to compare them with the expected ones: each reply's prompt is the row up to it,
 * rendered as in training, with the row's own earlier replies.
 */
import type { AgentTrainingConfig } from "../../config/index.js";
import type { Source } from "../../data/sources/source.js";
import { type DroppedImages, droppedImages } from "../../data/tokens/notes.js";
import { ArlError } from "../../errors.js";
import type { Native, NativeTextEncoder, TextOptions } from "../../native.js";
import { type InferenceOptions, openForInference } from "./inference.js";

/** What the model is given for one trained reply of a row, and the reply that is expected. */
export interface Prompt {
	row: number;
	location: string;
	/** Index of the reply among the row's messages. */
	message: number;
	inputIds: Int32Array;
	/** Tokens of the reply. */
	expected: Int32Array;
	/** The message before the reply, as `role: content`; empty where the row has none as text. */
	lastMessage: string;
}

/** What the model generated for a prompt. */
export interface Completion {
	text: string;
	/** Whether the model ended it by itself, and its text is the expected one. */
	exact: boolean;
	/** Number of new tokens. */
	tokens: number;
}

export interface ReplyOptions
	extends InferenceOptions,
		Pick<AgentTrainingConfig, "columns" | "images" | "chat_template" | "thinking" | "seed"> {
	/** Replies generated at a time. */
	batchSize: number;
	/** Null: as many as the longest expected reply has, and 8 more. */
	maxNewTokens: number | null;
	temperature: number;
	topK: number;
	topP: number;
}

/** Tokens above the longest expected reply that a reply may have: one that does not end in time shows it. */
const SPARE_TOKENS = 8;

function textOptions(modelDir: string, options: ReplyOptions): TextOptions {
	return {
		modelDir,
		truncation: "error",
		columns: options.columns,
		images: options.images,
		...(options.chat_template !== null && { chatTemplate: options.chat_template }),
		...(options.thinking !== null && { thinking: options.thinking }),
	};
}

/** The tokens of a reply without those at its end that close it. */
function trimEnd(ids: Int32Array, stopIds: readonly number[]): Int32Array {
	let end = ids.length;
	while (end > 0 && stopIds.includes(ids[end - 1] ?? -1)) end--;
	return ids.subarray(0, end);
}

/** Generates replies with one model. */
export class ReplyGenerator {
	readonly modelDir: string;
	/** Images that were left out of the prompts' rows. */
	readonly dropped: DroppedImages = { images: 0, rows: 0, emptied: 0 };
	readonly #options: ReplyOptions;
	readonly #encoder: NativeTextEncoder;
	readonly #stopIds: number[];

	/** Opens the tokenizer and the template; `sample`: some of the rows, to find out their shape. */
	constructor(native: Native, modelDir: string, options: ReplyOptions, sample: Uint8Array[]) {
		this.modelDir = modelDir;
		this.#options = options;
		this.#encoder = native.TextEncoder.open(textOptions(modelDir, options));
		this.#encoder.detect(sample);
		this.#stopIds = this.#encoder.info().stopIds;
	}

	/** The prompts of the first `limit` rows. */
	async prompts(source: Source, limit: number): Promise<Prompt[]> {
		const prompts: Prompt[] = [];
		const rows = Math.min(limit, source.length);
		for (let first = 0; first < rows; first += 256) {
			const indexes = Array.from({ length: Math.min(256, rows - first) }, (_, i) => first + i);
			const read = await source.read(indexes);
			for (const [i, row] of read.entries()) prompts.push(...this.#promptsOf(source, first + i, row));
		}
		if (prompts.length === 0) throw new ArlError("ARL_DATA", `${source.name}: no row has a trained reply`);
		return prompts;
	}

	#promptsOf(source: Source, index: number, row: Uint8Array): Prompt[] {
		const location = source.location(index);
		try {
			const encoded = this.#encoder.encode(row);
			const { images, rows, emptied } = droppedImages(encoded.notes);
			this.dropped.images += images;
			this.dropped.rows += rows;
			this.dropped.emptied += emptied;
			return encoded.spans.map(({ message, first, last }) => ({
				row: index,
				location,
				message,
				inputIds: this.#encoder.prompt(row, message),
				expected: encoded.inputIds.slice(first, last + 1),
				lastMessage: lastMessage(row, message),
			}));
		} catch (error) {
			if (error instanceof ArlError)
				throw new ArlError(error.code, `${location}: ${error.message}`, error.hint, { cause: error });
			throw error;
		}
	}

	/** The text of an expected reply, without the token that closes it. */
	expectedText(prompt: Prompt): string {
		return this.#encoder.decode(trimEnd(prompt.expected, this.#stopIds), false);
	}

	/** Generates a reply to each prompt; `progress` receives how many are done. */
	async generate(
		prompts: readonly Prompt[],
		progress: (done: number) => void,
		signal: AbortSignal,
	): Promise<Completion[]> {
		const { batchSize, temperature, topK, topP, seed } = this.#options;
		const expected = prompts.map((prompt) => this.expectedText(prompt));
		const longest = Math.max(...prompts.map((prompt) => prompt.expected.length));
		const maxNewTokens = this.#options.maxNewTokens ?? longest + SPARE_TOKENS;
		const maxSequences = Math.min(batchSize, prompts.length);
		const longestPrompt = Math.max(...prompts.map(({ inputIds }) => inputIds.length));
		const maxTokens = (longestPrompt + maxNewTokens) * maxSequences;
		const engine = await openForInference(this.modelDir, this.#options, { maxTokens, maxSequences });
		const interrupt = () => engine.interrupt();
		signal.addEventListener("abort", interrupt);
		try {
			const completions = new Array<Completion>(prompts.length);
			// Prompts of like length together; the completions are in the order of the prompts.
			const order = prompts.map(({ inputIds }, i) => ({ i, length: inputIds.length }));
			order.sort((a, b) => a.length - b.length || a.i - b.i);
			for (let first = 0; first < order.length; first += batchSize) {
				signal.throwIfAborted();
				const chosen = order.slice(first, first + batchSize).map(({ i }) => i);
				const replies = await engine.generate(
					chosen.flatMap((i) => prompts[i]?.inputIds ?? []),
					{ maxNewTokens, stopIds: this.#stopIds, temperature, topK, topP, seed },
				);
				for (const [at, i] of chosen.entries()) {
					const ids = replies[at] ?? new Int32Array();
					const said = trimEnd(ids, this.#stopIds);
					const text = this.#encoder.decode(said, false);
					const ended = ids.length < maxNewTokens || said.length < ids.length;
					completions[i] = { text, exact: ended && text === expected[i], tokens: ids.length };
				}
				progress(Math.min(order.length, first + batchSize));
			}
			return completions;
		} finally {
			signal.removeEventListener("abort", interrupt);
			await engine.close();
		}
	}
}

/** The message before a reply, where the row has it as text. */
function lastMessage(row: Uint8Array, reply: number): string {
	try {
		const value = JSON.parse(new TextDecoder().decode(row)) as { messages?: { role?: string; content?: unknown }[] };
		const before = value.messages?.[reply - 1];
		if (typeof before?.content === "string") return `${before.role ?? "?"}: ${before.content}`;
	} catch {
		// The core reads spellings that JSON.parse refuses; only the text for the report is missing.
	}
	return "";
}
