/** Documents in memory: their `_id`s with a few numbers each, packed. Knows nothing about files or databases. */
import type { BsonValue } from "./bson-json.js";

/** One document of a list. */
export interface Listed {
	id: BsonValue;
	/** Rows that it yields. */
	rows: number;
	/** `trained_count` when it was listed. */
	trainedCount: number;
}

/** An array that doubles, with room for one more element. */
function grown<T extends Uint8Array | Uint32Array | Float64Array>(from: T, to: T): T {
	to.set(from);
	return to;
}

/** A list of documents, in some 25 bytes each. */
export class DocumentList {
	private types = new Uint8Array(1024);
	private ends = new Float64Array(1024);
	private rows = new Uint32Array(1024);
	private counts = new Uint32Array(1024);
	private ids = Buffer.alloc(16 * 1024);
	length = 0;

	push({ id, rows, trainedCount }: Listed): void {
		if (this.length === this.types.length) this.grow();
		const from = this.length === 0 ? 0 : (this.ends[this.length - 1] as number);
		const size = id.end - id.at;
		if (from + size > this.ids.length) {
			const ids = Buffer.alloc(Math.max(this.ids.length * 2, from + size));
			this.ids.copy(ids);
			this.ids = ids;
		}
		id.bytes.copy(this.ids, from, id.at, id.end);
		this.types[this.length] = id.type;
		this.ends[this.length] = from + size;
		this.rows[this.length] = rows;
		this.counts[this.length] = trainedCount;
		this.length += 1;
	}

	private grow(): void {
		const size = this.types.length * 2;
		this.types = grown(this.types, new Uint8Array(size));
		this.ends = grown(this.ends, new Float64Array(size));
		this.rows = grown(this.rows, new Uint32Array(size));
		this.counts = grown(this.counts, new Uint32Array(size));
	}

	at(index: number): Listed {
		const from = index === 0 ? 0 : (this.ends[index - 1] as number);
		return {
			id: { type: this.types[index] as number, bytes: this.ids, at: from, end: this.ends[index] as number },
			rows: this.rows[index] as number,
			trainedCount: this.counts[index] as number,
		};
	}

	/** The content of the list, for a hash. */
	bytes(): Uint8Array[] {
		const { length } = this;
		const size = length === 0 ? 0 : (this.ends[length - 1] as number);
		const arrays = [this.types, this.ends, this.rows, this.counts].map((array) => array.subarray(0, length));
		const views = arrays.map(({ buffer, byteOffset, byteLength }) => new Uint8Array(buffer, byteOffset, byteLength));
		return [...views, this.ids.subarray(0, size)];
	}

	setRows(index: number, rows: number): void {
		this.rows[index] = rows;
	}
}
