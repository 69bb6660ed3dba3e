/**
 * Answers the trained replies of rows by real generation: each reply's prompt is the row up to it, rendered as in
 * training, with the row's own earlier replies. Knows the core's interface; knows nothing of how results are shown.
 */
import type { AgentTrainingConfig } from "../../config/index.js";
import type { Source } from "../../data/sources/source.js";
import { type DroppedImages, droppedImages } from "../../data/tokens/notes.js";
import type { ChosenDevice } from "../../device/index.js";
import { ArlError } from "../../errors.js";
import type { EngineOptions, Native, NativeEngine, NativeTextEncoder, TextOptions } from "../../native.js";
import { resolveBf16 } from "../setup/options.js";

/** A trained reply of a row: what the model is given, and what it should say. */
export interface Question {
	row: number;
	location: string;
	/** Index of the reply among the row's messages. */
	message: number;
	prompt: Int32Array;
	expected: Int32Array;
	/** The text of what the reply answers. */
	asked: string;
}

/** An answer to a question. */
export interface Answer {
	text: string;
	/** Ended by itself with the very text that was expected. */
	exact: boolean;
	/** Tokens generated. */
	tokens: number;
}

export interface AskOptions
	extends Pick<AgentTrainingConfig, "columns" | "images" | "chat_template" | "thinking" | "threads" | "seed"> {
	batchSize: number;
	/** null: as many as the longest expected reply has, and a few more. */
	maxNewTokens: number | null;
	temperature: number;
	bf16: boolean | "auto";
	/** Where the model runs. */
	device: ChosenDevice;
}

function textOptions(modelDir: string, options: AskOptions): TextOptions {
	return {
		modelDir,
		truncation: "error",
		columns: options.columns,
		images: options.images,
		...(options.chat_template !== null && { chatTemplate: options.chat_template }),
		...(options.thinking !== null && { thinking: options.thinking }),
	};
}

/** Ends of texts that are not part of what was said: the closing token of a reply. */
function trimEnd(ids: Int32Array, stopIds: readonly number[]): Int32Array {
	let end = ids.length;
	while (end > 0 && stopIds.includes(ids[end - 1] ?? -1)) end--;
	return ids.subarray(0, end);
}

/** One model that answers. */
export class Answerer {
	readonly modelDir: string;
	/** What was left out of the rows that were asked about. */
	readonly dropped: DroppedImages = { images: 0, rows: 0, emptied: 0 };
	readonly #options: AskOptions;
	readonly #encoder: NativeTextEncoder;
	readonly #stopIds: number[];

	/** Opens the tokenizer and the template; `sample` shows what shape the rows have. */
	constructor(native: Native, modelDir: string, options: AskOptions, sample: Uint8Array[]) {
		this.modelDir = modelDir;
		this.#options = options;
		this.#encoder = native.TextEncoder.open(textOptions(modelDir, options));
		this.#encoder.detect(sample);
		this.#stopIds = this.#encoder.info().stopIds;
	}

	/** The questions of the first `limit` rows. */
	async questions(source: Source, limit: number): Promise<Question[]> {
		const questions: Question[] = [];
		const rows = Math.min(limit, source.length);
		for (let first = 0; first < rows; first += 256) {
			const indexes = Array.from({ length: Math.min(256, rows - first) }, (_, i) => first + i);
			const read = await source.read(indexes);
			for (const [i, row] of read.entries()) questions.push(...this.#questionsOf(source, first + i, row));
		}
		if (questions.length === 0) throw new ArlError("ARL_DATA", `${source.name}: no row has a reply to be answered`);
		return questions;
	}

	#questionsOf(source: Source, index: number, row: Uint8Array): Question[] {
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
				prompt: this.#encoder.prompt(row, message),
				expected: encoded.inputIds.slice(first, last + 1),
				asked: this.#asked(row, message),
			}));
		} catch (error) {
			if (error instanceof ArlError)
				throw new ArlError(error.code, `${location}: ${error.message}`, error.hint, { cause: error });
			throw error;
		}
	}

	/** What stands between the previous reply and this one, in the row's own words where it has them. */
	#asked(row: Uint8Array, message: number): string {
		try {
			const value = JSON.parse(new TextDecoder().decode(row)) as { messages?: { role?: string; content?: unknown }[] };
			const before = value.messages?.[message - 1];
			if (typeof before?.content === "string") return `${before.role ?? "?"}: ${before.content}`;
		} catch {
			// The core has accepted the row already; only its words are missing here.
		}
		return "";
	}

	/** The text of an expected reply, without the token that closes it. */
	expectedText(question: Question): string {
		return this.#encoder.decode(trimEnd(question.expected, this.#stopIds), false);
	}

	/** Answers all questions; `progress` hears how many are done. */
	async answer(
		questions: readonly Question[],
		progress: (done: number) => void,
		signal: AbortSignal,
	): Promise<Answer[]> {
		const expected = questions.map((question) => this.expectedText(question));
		const longest = Math.max(...questions.map((question) => question.expected.length));
		const maxNewTokens = this.#options.maxNewTokens ?? longest + 8;
		const engine = await this.#open(questions, maxNewTokens);
		const interrupt = () => engine.interrupt();
		signal.addEventListener("abort", interrupt);
		try {
			const answers = new Array<Answer>(questions.length);
			// Prompts of like length together; the order of the answers is that of the questions.
			const order = questions.map((_, i) => i).sort((a, b) => length(questions, a) - length(questions, b) || a - b);
			for (let first = 0; first < order.length; first += this.#options.batchSize) {
				signal.throwIfAborted();
				const chosen = order.slice(first, first + this.#options.batchSize);
				const prompts = chosen.flatMap((i) => questions[i]?.prompt ?? []);
				const results = await engine.generate(prompts, {
					maxNewTokens,
					stopIds: this.#stopIds,
					temperature: this.#options.temperature,
					seed: this.#options.seed,
				});
				for (const [at, i] of chosen.entries()) {
					const ids = results[at] ?? new Int32Array();
					const text = this.#encoder.decode(trimEnd(ids, this.#stopIds), false);
					const ended = ids.length < maxNewTokens || trimEnd(ids, this.#stopIds).length < ids.length;
					answers[i] = { text, exact: ended && text === expected[i], tokens: ids.length };
				}
				progress(Math.min(order.length, first + this.#options.batchSize));
			}
			return answers;
		} finally {
			signal.removeEventListener("abort", interrupt);
			await engine.close();
		}
	}

	#open(questions: readonly Question[], maxNewTokens: number): Promise<NativeEngine> {
		const { device, native } = this.#options.device;
		const longest = Math.max(...questions.map(({ prompt }) => prompt.length));
		const sequences = Math.min(this.#options.batchSize, questions.length);
		const options: EngineOptions = {
			modelDir: this.modelDir,
			device,
			dtype: resolveBf16(this.#options.bf16, device) ? "bf16" : "f32",
			recompute: "block",
			maxTokens: (longest + maxNewTokens) * sequences,
			maxSequences: sequences,
			adamBeta1: 0.9,
			adamBeta2: 0.999,
			adamEpsilon: 1e-8,
			weightDecay: 0,
			inferenceOnly: true,
			...(this.#options.threads !== null && { threads: this.#options.threads }),
		};
		return native.Engine.open(options);
	}
}

function length(questions: readonly Question[], index: number): number {
	return questions[index]?.prompt.length ?? 0;
}
