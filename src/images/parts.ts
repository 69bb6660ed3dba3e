/**
 * Finds the content parts of messages in a row's JSON text as byte ranges, so that a URL can be replaced while every other byte
 * stays as it was (floats, key order, white space). Knows JSON and the columns of rows, not images.
 */

/** Bytes [start, end) of a row. */
export interface Range {
	start: number;
	end: number;
}

/** An element of a message's `content` list. */
export interface LocatedPart {
	/** Its `type`; null: absent, or not a string. */
	type: string | null;
	/** The JSON string with the URL of an `image_url` part; null: it has none. */
	url: Range | null;
	/** For people: `messages[0].content[1]`. */
	place: string;
}

/** Columns of messages, as the core knows them: by these names, or by those that the option `columns` gives for them. */
const MESSAGE_COLUMNS = [
	...["messages", "conversations", "prompt", "completion"],
	...["question", "problem", "instruction", "response", "output", "solution", "answer"],
] as const;

/** The text is not JSON; the parser that reads the row next reports where and why. */
class NotJson extends Error {}

const QUOTE = 0x22;
const BACKSLASH = 0x5c;

/** Walks over JSON text and calls back for entries and elements; recurses only into values that the caller visits. */
class Cursor {
	at = 0;
	private readonly bytes: Buffer;

	constructor(row: Uint8Array) {
		this.bytes = Buffer.from(row.buffer, row.byteOffset, row.byteLength);
	}

	/** The next byte that is not white space. */
	peek(): number {
		for (;;) {
			const byte = this.bytes[this.at];
			if (byte === undefined) throw new NotJson();
			if (byte !== 0x20 && byte !== 0x0a && byte !== 0x0d && byte !== 0x09) return byte;
			this.at += 1;
		}
	}

	is(character: string): boolean {
		return this.peek() === character.charCodeAt(0);
	}

	private take(character: string): boolean {
		if (!this.is(character)) return false;
		this.at += 1;
		return true;
	}

	private string(): Range {
		if (!this.is('"')) throw new NotJson();
		const start = this.at;
		for (let from = start + 1; ; ) {
			const quote = this.bytes.indexOf(QUOTE, from);
			if (quote < 0) throw new NotJson();
			let before = quote - 1;
			while (this.bytes[before] === BACKSLASH) before -= 1;
			from = quote + 1;
			// A quote after an odd number of backslashes is part of the text.
			if ((quote - 1 - before) % 2 === 0) {
				this.at = from;
				return { start, end: from };
			}
		}
	}

	/** The value of a JSON string. */
	text({ start, end }: Range): string {
		try {
			return String(JSON.parse(this.bytes.toString("utf8", start, end)));
		} catch {
			throw new NotJson();
		}
	}

	/** Skips one value of any kind and depth. */
	skip(): Range {
		this.peek();
		const start = this.at;
		let depth = 0;
		do {
			const byte = this.peek();
			if (byte === QUOTE) this.string();
			else if (byte === 0x7b || byte === 0x5b) {
				depth += 1;
				this.at += 1;
			} else if (byte === 0x7d || byte === 0x5d) {
				depth -= 1;
				this.at += 1;
			} else if (depth > 0 && (byte === 0x2c || byte === 0x3a)) this.at += 1;
			else this.scalar();
		} while (depth > 0);
		if (depth < 0) throw new NotJson();
		return { start, end: this.at };
	}

	private scalar(): void {
		const from = this.at;
		for (; this.at < this.bytes.length; this.at++) {
			const byte = this.bytes[this.at] as number;
			if (byte <= 0x20 || byte === 0x2c || byte === 0x5d || byte === 0x7d || byte === 0x3a) break;
		}
		if (this.at === from) throw new NotJson();
	}

	/** Walks over the entries of an object; `visit` is called with the cursor at the value, and must skip it. */
	object(visit: (key: string) => void): void {
		if (!this.take("{")) throw new NotJson();
		if (this.take("}")) return;
		do {
			const key = this.text(this.string());
			if (!this.take(":")) throw new NotJson();
			this.peek();
			visit(key);
		} while (this.take(","));
		if (!this.take("}")) throw new NotJson();
	}

	/** Walks over the elements of an array, as `object` does. */
	array(visit: (index: number) => void): void {
		if (!this.take("[")) throw new NotJson();
		if (this.take("]")) return;
		let index = 0;
		do {
			this.peek();
			visit(index);
			index += 1;
		} while (this.take(","));
		if (!this.take("]")) throw new NotJson();
	}
}

function partAt(cursor: Cursor, place: string): LocatedPart {
	const part: LocatedPart = { type: null, url: null, place };
	if (!cursor.is("{")) {
		cursor.skip();
		return part;
	}
	// Of a repeated key the last value counts, as in the core and in Python.
	cursor.object((key) => {
		if (key === "type") {
			const isText = cursor.is('"');
			const value = cursor.skip();
			part.type = isText ? cursor.text(value) : null;
		} else if (key === "image_url") {
			part.url = null;
			if (cursor.is("{")) {
				cursor.object((inner) => {
					const isUrl = inner === "url" && cursor.is('"');
					const value = cursor.skip();
					if (inner === "url") part.url = isUrl ? value : null;
				});
			} else {
				const isText = cursor.is('"');
				const value = cursor.skip();
				part.url = isText ? value : null;
			}
		} else cursor.skip();
	});
	return part;
}

/**
 * All content parts of a row's messages, in the order of the text. `columns`: the file's names of known columns. Empty for a
 * row that is not a JSON object.
 */
export function contentParts(row: Uint8Array, columns: Readonly<Record<string, string>> = {}): LocatedPart[] {
	const names = new Set(MESSAGE_COLUMNS.map((name) => columns[name] ?? name));
	const parts: LocatedPart[] = [];
	const cursor = new Cursor(row);
	try {
		cursor.object((column) => {
			if (!names.has(column) || !cursor.is("[")) {
				cursor.skip();
				return;
			}
			cursor.array((message) => {
				if (!cursor.is("{")) {
					cursor.skip();
					return;
				}
				cursor.object((key) => {
					// ShareGPT calls the content `value`.
					if ((key !== "content" && key !== "value") || !cursor.is("[")) {
						cursor.skip();
						return;
					}
					cursor.array((index) => {
						parts.push(partAt(cursor, `${column}[${message}].${key}[${index}]`));
					});
				});
			});
		});
	} catch (error) {
		if (error instanceof NotJson) return [];
		throw error;
	}
	return parts;
}

/** The row with `ranges` replaced; they must be in order and must not overlap. */
export function replaceRanges(row: Uint8Array, ranges: readonly { range: Range; by: Uint8Array }[]): Uint8Array {
	const pieces: Uint8Array[] = [];
	let from = 0;
	for (const { range, by } of ranges) {
		pieces.push(row.subarray(from, range.start), by);
		from = range.end;
	}
	pieces.push(row.subarray(from));
	return Buffer.concat(pieces);
}
