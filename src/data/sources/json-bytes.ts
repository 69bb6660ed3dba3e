/**
 * Writes JSON text as bytes: rows of column formats are assembled without becoming strings or objects, so that the values of a
 * column stay as they are. Knows JSON, and nothing about files.
 */

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const HEX = Buffer.from("0123456789abcdef");
const NULL = Buffer.from("null");

/** 0: not escaped in a string; 1: written as `\u00XX`; else the letter after the backslash. */
const ESCAPES = new Uint8Array(256).fill(1, 0, 0x20);
for (const [byte, letter] of [
	[0x08, "b"],
	[0x09, "t"],
	[0x0a, "n"],
	[0x0c, "f"],
	[0x0d, "r"],
	[QUOTE, '"'],
	[BACKSLASH, "\\"],
] as const) {
	ESCAPES[byte] = letter.charCodeAt(0);
}

/** Bytes of a string that are escaped at a time; each may become six. */
const PART = 64 * 1024;

function viewOf(buffer: Buffer): DataView {
	return new DataView(buffer.buffer, buffer.byteOffset, buffer.byteLength);
}

/** A growing buffer with methods that write JSON values. */
export class JsonBytes {
	private buffer = Buffer.allocUnsafeSlow(256 * 1024);
	private view = viewOf(this.buffer);
	length = 0;

	private room(bytes: number): void {
		const needed = this.length + bytes;
		if (needed <= this.buffer.length) return;
		const grown = Buffer.allocUnsafeSlow(Math.max(needed, this.buffer.length * 2));
		this.buffer.copy(grown, 0, 0, this.length);
		this.buffer = grown;
		this.view = viewOf(grown);
	}

	/** The bytes written so far; valid until the next call. */
	written(): Buffer {
		return this.buffer.subarray(0, this.length);
	}

	clear(): void {
		this.length = 0;
	}

	byte(value: number): void {
		if (this.length === this.buffer.length) this.room(1);
		this.buffer[this.length++] = value;
	}

	/** Writes bytes unchanged. */
	raw(bytes: Uint8Array): void {
		this.room(bytes.length);
		this.buffer.set(bytes, this.length);
		this.length += bytes.length;
	}

	/** Writes ASCII text unchanged: digits, `true`, a date in quotes. */
	ascii(text: string): void {
		this.room(text.length);
		const { buffer } = this;
		let at = this.length;
		for (let i = 0; i < text.length; i++) buffer[at++] = text.charCodeAt(i);
		this.length = at;
	}

	null(): void {
		this.raw(NULL);
	}

	/** Writes a string given as UTF-8. Invalid UTF-8 stays as it is, and is reported where rows are read. */
	string(bytes: Uint8Array): void {
		this.byte(QUOTE);
		for (let from = 0; from < bytes.length; from += PART) {
			const end = Math.min(bytes.length, from + PART);
			this.room((end - from) * 6);
			this.length = this.escaped(bytes, from, end, this.length);
		}
		this.byte(QUOTE);
	}

	/** Writes [from, end) of a string at `at`, where there must be room; returns the offset after it. */
	private escaped(bytes: Uint8Array, from: number, end: number, at: number): number {
		const { buffer, view } = this;
		const words = end - from < 16 ? null : new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
		let i = from;
		let to = at;
		while (i < end) {
			if (words !== null) {
				// Four bytes at a time while none of them is escaped.
				for (; i <= end - 4; i += 4, to += 4) {
					const word = words.getInt32(i, true);
					if (hasEscape(word)) break;
					view.setInt32(to, word, true);
				}
			}
			for (const stop = Math.min(end, i + 4); i < stop; i++) {
				const byte = bytes[i] as number;
				const letter = ESCAPES[byte] as number;
				if (letter === 0) {
					buffer[to++] = byte;
					continue;
				}
				buffer[to++] = BACKSLASH;
				if (letter !== 1) {
					buffer[to++] = letter;
					continue;
				}
				buffer[to++] = 0x75;
				buffer[to++] = 0x30;
				buffer[to++] = 0x30;
				buffer[to++] = HEX[byte >> 4] as number;
				buffer[to++] = HEX[byte & 15] as number;
			}
		}
		return to;
	}
}

/**
 * Whether one of the four bytes of a word is below 0x20, a quote or a backslash, by the tests for a byte below n and for a zero
 * byte from Anderson's "Bit Twiddling Hacks".
 */
function hasEscape(word: number): boolean {
	const quote = word ^ 0x22222222;
	const backslash = word ^ 0x5c5c5c5c;
	const below = (word - 0x20202020) & ~word;
	return ((below | ((quote - 0x01010101) & ~quote) | ((backslash - 0x01010101) & ~backslash)) & 0x80808080) !== 0;
}

/** `"name":` as bytes. */
export function keyBytes(name: string): Buffer {
	return Buffer.from(`${JSON.stringify(name)}:`);
}
