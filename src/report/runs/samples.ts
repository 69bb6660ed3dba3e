/** Generated replies of held-out rows: of each row the first one of the run and the latest, in bounded memory. */

/** A reply that the model generated, next to the expected one. */
export interface Reply {
	step: number;
	text: string;
	/** It is the expected one. */
	right: boolean;
}

/** A held-out row whose reply is generated again and again. */
export interface SampledRow {
	/** File and line. */
	location: string;
	source: string | null;
	prompt: string;
	expected: string;
	/** The first reply of the run. */
	before: Reply;
	/** The latest. */
	now: Reply;
}

/** Rows that are kept; the others are counted. */
const MOST_ROWS = 24;
/** Characters of a text that are kept. */
const MOST_CHARACTERS = 2000;

export class Samples {
	readonly #rows = new Map<string, SampledRow>();
	readonly #others = new Set<string>();

	/** Takes a line `{"event":"sample", ...}` of `metrics.jsonl`; one of another shape is left out. */
	add(line: { step: number } & Record<string, unknown>): void {
		const { step, location, message, source, prompt, expected, reply, right } = line;
		if (typeof location !== "string" || typeof reply !== "string") return;
		const key = `${location} ${message}`;
		const now = { step, text: cut(reply), right: right === true };
		const row = this.#rows.get(key);
		if (row !== undefined) {
			row.now = now;
		} else if (this.#rows.size < MOST_ROWS) {
			this.#rows.set(key, {
				location,
				source: typeof source === "string" ? source : null,
				prompt: cut(prompt),
				expected: cut(expected),
				before: now,
				now,
			});
		} else if (this.#others.size < 1_000_000) {
			this.#others.add(key);
		}
	}

	/** The first of the kept rows, `bytes` of JSON together at most, and the number of rows left out. */
	within(bytes: number): { rows: SampledRow[]; others: number } {
		const rows: SampledRow[] = [];
		let left = bytes;
		for (const row of this.#rows.values()) {
			left -= Buffer.byteLength(JSON.stringify(row));
			if (left < 0) break;
			rows.push(row);
		}
		return { rows, others: this.#rows.size - rows.length + this.#others.size };
	}
}

function cut(text: unknown): string {
	if (typeof text !== "string") return "";
	return text.length > MOST_CHARACTERS ? `${text.slice(0, MOST_CHARACTERS)} ...` : text;
}
