/** A reply that is being generated: its text as it comes, and the whole of it. */
import type { ChatMessage } from "../data/sources/record.js";
import { ArlError, toArlError } from "../errors.js";

/** Generated text, complete. */
export interface Completion {
	/** The new text, without the end token or the stop text that ended it. */
	text: string;
	/** The new tokens, without the end token. */
	tokens: number[];
	/** `stop`: an end token of the model or a stop text came. `length`: `maxNewTokens`, or the model's context, was reached. */
	finishReason: "stop" | "length";
	/** Tokens of the prompt, as the model read it. */
	promptTokens: number;
	/** `tokens.length`. */
	completionTokens: number;
}

/** The model's reply to a conversation, complete. */
export interface ChatCompletion extends Completion {
	/** The reply as a message: `reasoning_content` and `tool_calls` apart from `content`. Append it for the next turn. */
	message: ChatMessage;
}

type Run<T> = (push: (text: string) => void, signal: AbortSignal) => Promise<T>;

/**
 * A reply. Iterate it for the text as it is generated, or await `completion()` for the whole; both work, in this order too.
 * Generation starts with either. Leaving the loop early stops it.
 */
export class Reply<T extends Completion = Completion> implements AsyncIterable<string> {
	readonly #run: Run<T>;
	readonly #left = new AbortController();
	readonly #parts: string[] = [];
	#result: Promise<T> | null = null;
	#ended = false;
	#iterated = false;
	#wake = () => {};

	/** @internal */
	constructor(run: Run<T>) {
		this.#run = run;
	}

	/**
	 * The whole reply.
	 *
	 * @throws ArlError `ARL_INTERRUPTED` where the signal, or leaving the loop, stopped it.
	 */
	completion(): Promise<T> {
		if (this.#result === null) {
			const push = (text: string) => {
				this.#parts.push(text);
				this.#wake();
			};
			this.#result = this.#run(push, this.#left.signal)
				.catch((error: unknown) => {
					throw toArlError(error);
				})
				.finally(() => {
					this.#ended = true;
					this.#wake();
				});
			// Whoever iterates receives the error there.
			this.#result.catch(() => {});
		}
		return this.#result;
	}

	/** The text as it is generated; each part is whole characters. Once only. */
	async *[Symbol.asyncIterator](): AsyncGenerator<string, void> {
		if (this.#iterated)
			throw new ArlError("ARL_USAGE", "this reply was read already", "Await completion() for its text.");
		this.#iterated = true;
		const result = this.completion();
		try {
			for (;;) {
				const part = this.#parts.shift();
				if (part !== undefined) yield part;
				else if (this.#ended) break;
				else {
					await new Promise<void>((resolve) => {
						this.#wake = resolve;
					});
				}
			}
			await result;
		} finally {
			this.#left.abort();
			// The engine is free for the next reply when the loop is left.
			await result.catch(() => {});
		}
	}
}
