/**
 * In which order rows are trained: a pure function of seed, epoch and row counts, so that a resumed run has the same order
 * without having kept it. Knows nothing of tokens.
 *
 * Shuffling is Fisher and Yates' with xoshiro128** (Blackman and Vigna, 2018), whose state is the first 16 bytes of
 * SHA-256 over what the permutation is for. Bounded numbers are drawn by rejection, so that every order is equally likely.
 */
import { createHash } from "node:crypto";
import { ArlError } from "../errors.js";

/** xoshiro128**: 32 random bits a call. `state` must not be all zeros. */
export function xoshiro128(state: [number, number, number, number]): () => number {
	let [a, b, c, d] = state.map((word) => word >>> 0) as [number, number, number, number];
	const rotate = (x: number, by: number) => ((x << by) | (x >>> (32 - by))) >>> 0;
	return () => {
		const result = Math.imul(rotate(Math.imul(b, 5), 7), 9) >>> 0;
		const shifted = (b << 9) >>> 0;
		c = (c ^ a) >>> 0;
		d = (d ^ b) >>> 0;
		b = (b ^ c) >>> 0;
		a = (a ^ d) >>> 0;
		c = (c ^ shifted) >>> 0;
		d = rotate(d, 11);
		return result;
	};
}

function generator(purpose: string): () => number {
	const digest = createHash("sha256").update(purpose).digest();
	const state: [number, number, number, number] = [0, 4, 8, 12].map((at) => digest.readUInt32LE(at)) as [
		number,
		number,
		number,
		number,
	];
	return xoshiro128(state);
}

/** Shuffles in place. `purpose` names the permutation: the same name and length give the same order on every machine. */
export function shuffle(values: Uint32Array, purpose: string): Uint32Array {
	const next = generator(purpose);
	for (let i = values.length - 1; i > 0; i--) {
		const count = i + 1;
		let draw = next();
		// Draws above the largest multiple of `count` that 32 bits hold would favour small numbers.
		while (draw - (draw % count) > 0x1_0000_0000 - count) draw = next();
		const j = draw % count;
		const kept = values[i] as number;
		values[i] = values[j] as number;
		values[j] = kept;
	}
	return values;
}

/** The order of the rows: epochs are counted from 0. */
export interface RowOrder {
	/** Rows that each epoch trains. */
	readonly rowsPerEpoch: number;
	/** Every row that some epoch may train, in the order of the source. */
	readonly all: Uint32Array;
	/** Row numbers of epoch `epoch`, in the order trained. */
	epoch(epoch: number): Uint32Array;
}

export interface OrderOptions {
	/** Rows of the source. */
	rows: number;
	seed: number;
	strategy: "random" | "sequential";
	/** Rows to leave out: true stands for usable. Absent: all rows are used. */
	usable?: (row: number) => boolean;
	/** A mixture: consecutive parts of the rows with their relative weights. Absent: every row once. */
	mixture?: { rows: number[]; weights: number[] };
	/** The most rows of each consecutive part that are used at all, drawn with the seed; null: all. Absent: all of all. */
	caps?: { rows: number[]; caps: (number | null)[] };
}

function usableRows(start: number, end: number, usable: OrderOptions["usable"]): Uint32Array {
	if (!usable) return Uint32Array.from({ length: end - start }, (_, i) => start + i);
	const rows: number[] = [];
	for (let row = start; row < end; row++) if (usable(row)) rows.push(row);
	return Uint32Array.from(rows);
}

/** At most `cap` rows of a part, drawn with the seed; they keep their order. */
function capped(part: Uint32Array, cap: number | null, purpose: string): Uint32Array {
	if (cap === null || part.length <= cap) return part;
	return shuffle(part.slice(), purpose).subarray(0, cap).sort();
}

/** The usable rows of each consecutive part, under its cap. */
function partsOf({ seed, usable, caps }: OrderOptions, rows: number[]): Uint32Array[] {
	if (caps && caps.caps.length !== rows.length) {
		throw new ArlError(
			"ARL_CONFIG",
			`train_caps: ${caps.caps.length} values for ${rows.length} entries`,
			"Give one for each entry of train_file, in the same order, and one more for a data set from code; none is no bound.",
		);
	}
	let start = 0;
	return rows.map((count, i) => {
		const part = usableRows(start, start + count, usable);
		start += count;
		return capped(part, caps?.caps[i] ?? null, `arl cap ${seed} ${i}`);
	});
}

function concat(parts: readonly Uint32Array[]): Uint32Array {
	const all = new Uint32Array(parts.reduce((sum, part) => sum + part.length, 0));
	let at = 0;
	for (const part of parts) {
		all.set(part, at);
		at += part.length;
	}
	return all;
}

/** `total` in whole parts proportional to the weights; what rounding leaves goes to the largest remainders, earlier ones first. */
export function proportionalCounts(total: number, weights: number[]): number[] {
	const sum = weights.reduce((a, b) => a + b, 0);
	const exact = weights.map((weight) => (total * weight) / sum);
	const counts = exact.map(Math.floor);
	const left = total - counts.reduce((a, b) => a + b, 0);
	const byRemainder = exact
		.map((value, i) => ({ i, rest: value - Math.floor(value) }))
		.sort((a, b) => b.rest - a.rest || a.i - b.i);
	for (const { i } of byRemainder.slice(0, left)) counts[i] = (counts[i] as number) + 1;
	return counts;
}

/**
 * The order without a mixture: every usable row once an epoch.
 *
 * With a mixture an epoch has as many rows as there are usable ones in all, and each part gives its share of them. A part's
 * rows form an endless stream of permutations of it, from which each epoch takes up where the last one stopped: no row
 * comes a second time before every other row of its part has come once.
 */
export function createOrder(options: OrderOptions): RowOrder {
	const { rows, seed, strategy, usable, mixture, caps } = options;
	const random = strategy === "random";
	if (!mixture) {
		const all = caps ? concat(partsOf(options, caps.rows)) : usableRows(0, rows, usable);
		return {
			rowsPerEpoch: all.length,
			all,
			epoch: (epoch) => (random ? shuffle(all.slice(), `arl order ${seed} ${epoch}`) : all),
		};
	}
	if (mixture.rows.length !== mixture.weights.length) {
		throw new ArlError(
			"ARL_CONFIG",
			`train_weights: ${mixture.weights.length} weights for ${mixture.rows.length} entries`,
			"Give one weight for each entry of train_file, in the same order, and one more for a data set from code.",
		);
	}
	const parts = partsOf(options, mixture.rows);
	const total = parts.reduce((sum, part) => sum + part.length, 0);
	const counts = proportionalCounts(total, mixture.weights);
	for (const [i, part] of parts.entries()) {
		if (part.length === 0 && (counts[i] as number) > 0) {
			throw new ArlError("ARL_DATA", `train_weights: entry ${i + 1} has a weight and no usable rows`);
		}
	}
	return {
		rowsPerEpoch: total,
		all: concat(parts),
		epoch: (epoch) => {
			const chosen = new Uint32Array(total);
			let at = 0;
			for (const [i, part] of parts.entries()) {
				const count = counts[i] as number;
				takeFromStream(part, epoch * count, count, chosen.subarray(at, at + count), (cycle, values) =>
					random ? shuffle(values, `arl mixture ${seed} ${i} ${cycle}`) : values,
				);
				at += count;
			}
			return random ? shuffle(chosen, `arl order ${seed} ${epoch}`) : chosen;
		},
	};
}

/** `count` values from position `from` on of the endless stream of permutations of `part`. */
function takeFromStream(
	part: Uint32Array,
	from: number,
	count: number,
	into: Uint32Array,
	permute: (cycle: number, values: Uint32Array) => Uint32Array,
): void {
	let done = 0;
	while (done < count) {
		const cycle = Math.floor((from + done) / part.length);
		const inCycle = (from + done) % part.length;
		const take = Math.min(part.length - inCycle, count - done);
		into.set(permute(cycle, part.slice()).subarray(inCycle, inCycle + take), done);
		done += take;
	}
}
