/** The prompts of rows: each trained reply's is the row up to it, rendered as in training, with the row's own earlier replies. */
import type { RowContent, Source } from "../../data/sources/source.js";
import { type DroppedImages, droppedImages } from "../../data/tokens/notes.js";
import { ArlError } from "../../errors.js";
import type { NativeTextEncoder } from "../../native.js";

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

/** Rows as prompts, by an encoder that knows their shape. */
export class RowPrompts {
	/** Images that were left out of the prompts' rows. */
	readonly dropped: DroppedImages = { images: 0, rows: 0, emptied: 0 };
	readonly stopIds: number[];

	constructor(private readonly encoder: NativeTextEncoder) {
		this.stopIds = encoder.info().stopIds;
	}

	/** The prompts of a row. Throws with its place where it cannot be used. */
	of(source: Pick<Source<RowContent>, "location">, index: number, row: Uint8Array): Prompt[] {
		const location = source.location(index);
		try {
			const encoded = this.encoder.encode(row);
			const { images, rows, emptied } = droppedImages(encoded.notes);
			this.dropped.images += images;
			this.dropped.rows += rows;
			this.dropped.emptied += emptied;
			return encoded.spans.map(({ message, first, last }) => ({
				row: index,
				location,
				message,
				inputIds: this.encoder.prompt(row, message),
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
		return this.text(prompt.expected).text;
	}

	/** The text of a reply's tokens without those at its end that close it, and whether there are such. */
	text(ids: Int32Array): { text: string; closed: boolean } {
		let end = ids.length;
		while (end > 0 && this.stopIds.includes(ids[end - 1] ?? -1)) end--;
		return { text: this.encoder.decode(ids.subarray(0, end), false), closed: end < ids.length };
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
