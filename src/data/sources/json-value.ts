/**
 * Parses JSON text into exact values, and writes them back: integers are bigint, floats number, objects Map. Accepts what the
 * core accepts (`crates/arl-text/src/row/json.rs`), and refuses the rest for the same reasons.
 */
import { floatText } from "./json-text.js";

/** A JSON value: integers of any size are bigint, all other numbers float64. */
export type JsonValue = null | boolean | string | bigint | number | JsonValue[] | JsonObject;
/** In the order of the text; a repeated key keeps its first place and its last value, as in Python. */
export type JsonObject = Map<string, JsonValue>;

/** A number with a given text: how it is written. */
export class NumberText {
	constructor(readonly text: string) {}
}

/** A value whose numbers may have a given text; undefined: its key is left out. */
export type PlainValue = JsonValue | NumberText | PlainValue[] | Map<string, PlainValue> | undefined;

/** Why a row cannot be used: `reason` is stable and short, the message says what is wrong in it. */
export class RowProblem extends Error {
	constructor(
		readonly reason: string,
		message: string,
	) {
		super(message);
	}
}

const MAX_DEPTH = 256;
const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const ESCAPES: Readonly<Record<string, string>> = {
	'"': '"',
	"\\": "\\",
	"/": "/",
	b: "\b",
	f: "\f",
	n: "\n",
	r: "\r",
	t: "\t",
};
const NUMBER = /-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?/y;

/** Parses a row's bytes. Throws `RowProblem`. */
export function parseJson(bytes: Uint8Array): JsonValue {
	let text: string;
	try {
		text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
	} catch {
		throw new RowProblem("not UTF-8", "not valid UTF-8");
	}
	return new Parser(text).whole();
}

class Parser {
	private at = 0;

	constructor(private readonly text: string) {}

	whole(): JsonValue {
		const value = this.value(0);
		this.space();
		if (this.at < this.text.length) throw this.wrong("something follows the value");
		return value;
	}

	private wrong(what: string): RowProblem {
		return new RowProblem("not json", `not JSON: ${what} at character ${this.at + 1}`);
	}

	private space(): void {
		for (;;) {
			const code = this.text.charCodeAt(this.at);
			if (code !== 0x20 && code !== 0x0a && code !== 0x0d && code !== 0x09) return;
			this.at += 1;
		}
	}

	private value(depth: number): JsonValue {
		this.space();
		const first = this.text[this.at];
		switch (first) {
			case '"':
				return this.string();
			case "{":
			case "[":
				if (depth >= MAX_DEPTH)
					throw new RowProblem("too deep", `arrays and objects are nested more than ${MAX_DEPTH} deep`);
				return first === "{" ? this.object(depth) : this.array(depth);
			case "t":
				return this.word("true", true);
			case "f":
				return this.word("false", false);
			case "n":
				return this.word("null", null);
			case undefined:
				throw this.wrong("the text ends early");
			default:
				return this.number();
		}
	}

	private word(word: string, value: JsonValue): JsonValue {
		if (!this.text.startsWith(word, this.at)) throw this.wrong("no value");
		this.at += word.length;
		return value;
	}

	private number(): bigint | number {
		NUMBER.lastIndex = this.at;
		const found = NUMBER.exec(this.text);
		if (found === null) throw this.wrong("no value");
		const [word, fraction, exponent] = found;
		const value = fraction === undefined && exponent === undefined ? BigInt(word) : Number(word);
		if (typeof value === "number" && !Number.isFinite(value)) throw this.wrong("a number is out of range");
		this.at += word.length;
		if (/\d/.test(this.text[this.at] ?? "")) throw this.wrong("a number begins with 0");
		return value;
	}

	private array(depth: number): JsonValue[] {
		this.at += 1;
		const items: JsonValue[] = [];
		this.space();
		if (this.text[this.at] === "]") {
			this.at += 1;
			return items;
		}
		for (;;) {
			items.push(this.value(depth + 1));
			this.space();
			const next = this.text[this.at];
			if (next !== "," && next !== "]") throw this.wrong("no `,` or `]`");
			this.at += 1;
			if (next === "]") return items;
		}
	}

	private object(depth: number): JsonObject {
		this.at += 1;
		const entries: JsonObject = new Map();
		this.space();
		if (this.text[this.at] === "}") {
			this.at += 1;
			return entries;
		}
		for (;;) {
			this.space();
			if (this.text[this.at] !== '"') throw this.wrong("no key");
			const key = this.string();
			this.space();
			if (this.text[this.at] !== ":") throw this.wrong("no `:`");
			this.at += 1;
			entries.set(key, this.value(depth + 1));
			this.space();
			const next = this.text[this.at];
			if (next !== "," && next !== "}") throw this.wrong("no `,` or `}`");
			this.at += 1;
			if (next === "}") return entries;
		}
	}

	private string(): string {
		this.at += 1;
		let out = "";
		for (;;) {
			const start = this.at;
			let code = this.text.charCodeAt(this.at);
			while (code !== QUOTE && code !== BACKSLASH && code >= 0x20) {
				this.at += 1;
				code = this.text.charCodeAt(this.at);
			}
			out += this.text.slice(start, this.at);
			if (code === QUOTE) {
				this.at += 1;
				return out;
			}
			if (Number.isNaN(code)) throw this.wrong("a string does not end");
			if (code !== BACKSLASH) throw this.wrong("a control character in a string");
			this.at += 1;
			out += this.escape();
		}
	}

	private escape(): string {
		const letter = this.text[this.at] ?? "";
		this.at += 1;
		if (letter !== "u") {
			const plain = ESCAPES[letter];
			if (plain === undefined) throw this.wrong("an escape that JSON does not have");
			return plain;
		}
		const high = this.hex();
		if (high < 0xd800 || high > 0xdfff) return String.fromCharCode(high);
		if (high < 0xdc00 && this.text.startsWith("\\u", this.at)) {
			this.at += 2;
			const low = this.hex();
			if (low >= 0xdc00 && low <= 0xdfff) return String.fromCharCode(high, low);
		}
		throw new RowProblem("lone surrogate", `\\u${high.toString(16)} is half of a surrogate pair: no character`);
	}

	private hex(): number {
		const digits = this.text.slice(this.at, this.at + 4);
		if (!/^[0-9a-f]{4}$/i.test(digits)) throw this.wrong("no four hexadecimal digits");
		this.at += 4;
		return Number.parseInt(digits, 16);
	}
}

/** A value as compact JSON text: equal values, digit for digit, have equal texts. */
export function jsonText(value: PlainValue): string {
	if (value instanceof NumberText) return value.text;
	if (typeof value === "bigint") return String(value);
	if (typeof value === "number") return floatText(value);
	if (Array.isArray(value)) return `[${value.map(jsonText).join(",")}]`;
	if (value instanceof Map) {
		return `{${[...value].map(([key, item]) => `${JSON.stringify(key)}:${jsonText(item)}`).join(",")}}`;
	}
	return JSON.stringify(value ?? null);
}

/** The name of a kind of value in messages. */
export function kindOf(value: JsonValue | undefined): string {
	if (value === undefined) return "missing";
	if (value === null) return "null";
	if (Array.isArray(value)) return "an array";
	if (value instanceof Map) return "an object";
	if (typeof value === "bigint" || typeof value === "number") return "a number";
	return `a ${typeof value}`;
}
