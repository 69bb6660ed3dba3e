/** The prompts of rows: each trained reply's is the row up to it, rendered as in training, with the row's own earlier replies. */
import type { AnySource } from "../../data/sources/source.js";
import { type DroppedImages, droppedImages } from "../../data/tokens/notes.js";
import { type PictureLoader, rowImage, type WantedImage } from "../../data/tokens/pictures.js";
import { ArlError } from "../../errors.js";
import type { NativeTextEncoder, PreparedImage, RowImage } from "../../native.js";

/** What the model is given for one trained reply of a row, and the reply that is expected. */
export interface Prompt {
	row: number;
	location: string;
	/** Index of the reply among the row's messages. */
	message: number;
	inputIds: Int32Array;
	/** `[T]` or `[3, T]`: of its tokens; empty where it has no images. */
	positions: Int32Array;
	/** The images before the reply, in order. */
	images: WantedImage[];
	/** Tokens of the reply. */
	expected: Int32Array;
	/** The message before the reply, as `role: content`; empty where the row has none as text. */
	lastMessage: string;
}

/** Rows of a source as prompts, by an encoder that knows their shape. */
export class RowPrompts {
	/** Images that were left out of the prompts' rows. */
	readonly dropped: DroppedImages = { images: 0, rows: 0, emptied: 0 };
	readonly stopIds: number[];

	/** `loader`: of the rows' images; null: the model does not see them. */
	constructor(
		private readonly encoder: NativeTextEncoder,
		private readonly source: Pick<AnySource, "location" | "read">,
		private readonly loader: PictureLoader | null,
	) {
		this.stopIds = encoder.info().stopIds;
	}

	/** The prompts of a row. Throws with its place where it cannot be used. */
	async of(index: number, row: Uint8Array): Promise<Prompt[]> {
		const location = this.source.location(index);
		try {
			const images = (await this.loader?.measure(row))?.map(rowImage) ?? [];
			const encoded = this.encoder.encode(row, images);
			const { images: left, rows, emptied } = droppedImages(encoded.notes);
			this.dropped.images += left;
			this.dropped.rows += rows;
			this.dropped.emptied += emptied;
			return encoded.spans.map(({ message, first, last }) => {
				const prompt = promptOf(this.encoder, row, message, images);
				return {
					row: index,
					location,
					message,
					...prompt,
					expected: encoded.inputIds.slice(first, last + 1),
					lastMessage: lastMessage(row, message),
				};
			});
		} catch (error) {
			throw placed(error, location);
		}
	}

	/** The pixels of a prompt's images, read again from its row. */
	async pixels({ row, location, images }: Prompt): Promise<PreparedImage[]> {
		if (images.length === 0 || this.loader === null) return [];
		const [content] = await this.source.read([row]);
		if (!(content instanceof Uint8Array))
			throw new ArlError("ARL_DATA", `${location}: the row cannot be read again: ${content?.message ?? "it is gone"}`);
		try {
			return await this.loader.prepare(content, images);
		} catch (error) {
			throw placed(error, location);
		}
	}

	/** Patches of a prompt's images. */
	patches({ images }: Prompt): number {
		return images.reduce((sum, { height, width }) => sum + (this.loader?.patches(height, width) ?? 0), 0);
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

/** What a model reads before message `until` of a row. `images`: all of the row's, as they were measured. */
export function promptOf(
	encoder: NativeTextEncoder,
	row: Uint8Array,
	until: number,
	images: readonly RowImage[],
): Pick<Prompt, "inputIds" | "positions" | "images"> {
	if (images.length === 0) return { inputIds: encoder.prompt(row, until), positions: new Int32Array(), images: [] };
	const { inputIds, positions, images: seen } = encoder.promptRow(row, until, [...images]);
	return { inputIds, positions, images: seen.map(({ place }) => ({ ...(images[place] as RowImage), place })) };
}

/** The same error with the place of its row. */
function placed(error: unknown, location: string): unknown {
	if (!(error instanceof ArlError)) return error;
	return new ArlError(error.code, `${location}: ${error.message}`, error.hint, { cause: error });
}

/** The message before a reply, where the row has it as text. */
function lastMessage(row: Uint8Array, reply: number): string {
	try {
		const value = JSON.parse(new TextDecoder().decode(row)) as { messages?: { role?: string; content?: unknown }[] };
		const before = value.messages?.[reply - 1];
		const text = textOf(before?.content);
		if (text !== null) return `${before?.role ?? "?"}: ${text}`;
	} catch {
		// The core reads spellings that JSON.parse refuses; only the text for the report is missing.
	}
	return "";
}

/** A message's text; images are named in it. Null: it has none. */
function textOf(content: unknown): string | null {
	if (typeof content === "string") return content;
	if (!Array.isArray(content)) return null;
	const parts = content.map((part: { type?: string; text?: unknown }) =>
		typeof part?.text === "string" ? part.text : `[${String(part?.type ?? "part").replace("_url", "")}]`,
	);
	return parts.join("");
}
