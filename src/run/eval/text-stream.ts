/** Text of tokens that arrive one by one: whole characters only, and nothing from a stop text on. */

/** What the tokenizer writes for bytes that are no whole character. */
const REPLACEMENT = "\uFFFD";

export class TextStream {
	/** Tokens whose text may still change. */
	readonly #tokens: number[] = [];
	/** Characters of their text that were taken into `#held`. */
	#taken = 0;
	/** Text that may be the beginning of a stop text. */
	#held = "";
	#stopped = false;
	readonly #decode: (ids: Int32Array) => string;
	readonly #stop: readonly string[];

	constructor(decode: (ids: Int32Array) => string, stop: readonly string[]) {
		this.#decode = decode;
		this.#stop = stop;
	}

	/** Whether a stop text came: the text before it has been returned, and nothing follows. */
	get stopped(): boolean {
		return this.#stopped;
	}

	/** The text that is settled by one more token. */
	push(id: number): string {
		this.#tokens.push(id);
		const text = this.#decode(Int32Array.from(this.#tokens));
		// Only the last replacement character can be a part of a character whose other bytes are still to come.
		const settled = text.endsWith(REPLACEMENT) ? text.slice(0, -1) : text;
		this.#held += settled.slice(this.#taken);
		this.#taken = settled.length;
		if (settled === text) {
			this.#tokens.length = 0;
			this.#taken = 0;
		}
		return this.#release();
	}

	/** What is left when no more tokens come. */
	end(): string {
		if (this.#stopped) return "";
		return this.#held + this.#decode(Int32Array.from(this.#tokens)).slice(this.#taken);
	}

	#release(): string {
		const found = this.#stop.map((stop) => this.#held.indexOf(stop)).filter((at) => at >= 0);
		this.#stopped = found.length > 0;
		const kept = Math.max(0, ...this.#stop.map((stop) => overlap(this.#held, stop)));
		const end = this.#stopped ? Math.min(...found) : this.#held.length - kept;
		const text = this.#held.slice(0, end);
		this.#held = this.#held.slice(end);
		return text;
	}
}

/** How many characters at the end of `text` begin `stop`, without being all of it. */
function overlap(text: string, stop: string): number {
	let length = Math.min(text.length, stop.length - 1);
	while (length > 0 && !text.endsWith(stop.slice(0, length))) length--;
	return length;
}
