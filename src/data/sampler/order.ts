/**
 * The order in which rows are trained: a pure function of seed, epoch and row counts, so that a resumed run finds the same order
 * without having saved it. Knows nothing of tokens.
 *
 * Shuffling is Fisher and Yates' with xoshiro128** (Blackman and Vigna, 2018), whose state is the first 16 bytes of
 * SHA-256 of the name of the permutation. Bounded numbers are drawn by rejection, so that every order is equally likely.
 */
import { createHash } from "node:crypto";
import { setImmediate } from "node:timers/promises";
import { ArlError } from "../../errors.js";

/** The state of xoshiro128**: four words of 32 bits, not all zeros. */
export type RandomState = [number, number, number, number];

function rotate(x: number, by: number): number {
	return (x << by) | (x >>> (32 - by));
}

/** The next 32 random bits of xoshiro128**. */
function nextBits(state: RandomState): number {
	const [a, b, c, d] = state;
	const result = Math.imul(rotate(Math.imul(b, 5), 7), 9) >>> 0;
	const e = c ^ a;
	const f = d ^ b;
	state[1] = b ^ e;
	state[0] = a ^ f;
	state[2] = e ^ (b << 9);
	state[3] = rotate(f, 11);
	return result;
}

/** xoshiro128**: 32 random bits a call. `state` must not be all zeros. */
export function xoshiro128(state: RandomState): () => number {
	const own: RandomState = [...state];
	return () => nextBits(own);
}

/** Draws between pauses: some milliseconds. */
const SLICE = 1 << 17;

/** Work in slices, between which the caller may let the rest of the process run. */
type Slices<T> = Generator<void, T>;

/** The result of work, computed without pauses. */
function atOnce<T>(work: Slices<T>): T {
	for (;;) {
		const { done, value } = work.next();
		if (done) return value;
	}
}

/** The result of work, with a pause after each slice. */
async function withPauses<T>(work: Slices<T>): Promise<T> {
	for (;;) {
		const { done, value } = work.next();
		if (done) return value;
		await setImmediate();
	}
}

/** Draws the values at places [stop + 1, last] of a permutation. */
function drawPlaces(values: Uint32Array, last: number, stop: number, state: RandomState): void {
	for (let i = last; i > stop; i--) {
		const places = i + 1;
		let draw: number;
		let j: number;
		do {
			draw = nextBits(state);
			// The remainder; both are below 2^32, so the quotient of doubles rounds down to the right integer.
			j = draw - Math.floor(draw / places) * places;
			// Draws above the largest multiple of `places` that 32 bits hold would favour small numbers.
		} while (draw - j > 0x1_0000_0000 - places);
		const kept = values[i] as number;
		values[i] = values[j] as number;
		values[j] = kept;
	}
}

function* shuffling(values: Uint32Array, purpose: string): Slices<Uint32Array> {
	const digest = createHash("sha256").update(purpose).digest();
	const state = [0, 4, 8, 12].map((at) => digest.readInt32LE(at)) as RandomState;
	for (let last = values.length - 1; last > 0; last -= SLICE) {
		drawPlaces(values, last, Math.max(0, last - SLICE), state);
		yield;
	}
	return values;
}

/** Shuffles in place. The same `purpose` and length give the same order on every machine. */
export function shuffle(values: Uint32Array, purpose: string): Uint32Array {
	return atOnce(shuffling(values, purpose));
}

/** The order of the rows. Epochs are counted from 0. */
export interface RowOrder {
	/** Rows that each epoch trains. */
	readonly rowsPerEpoch: number;
	/** Every row that some epoch may train, in the order of the source. */
	readonly all: Uint32Array;
	/** Row numbers of an epoch in training order. Callers must not write to them. */
	epoch(epoch: number): Uint32Array;
	/** Computes what `epoch(epoch)` returns, with pauses in which the rest of the process runs. */
	prepare(epoch: number): Promise<void>;
}

export interface OrderOptions {
	/** Rows of the source. */
	rows: number;
	seed: number;
	strategy: "random" | "sequential";
	/** Whether a row is used. Absent: all rows are. */
	usable?: (row: number) => boolean;
	/** A mixture: consecutive parts of the rows, and their relative weights. Absent: every row once. */
	mixture?: { rows: number[]; weights: number[] };
	/** The most rows of each consecutive part that are used, drawn with the seed; null: all. Absent: all of all parts. */
	caps?: { rows: number[]; caps: (number | null)[] };
}

function usableRows(start: number, end: number, usable: OrderOptions["usable"]): Uint32Array {
	const rows = new Uint32Array(end - start);
	let count = 0;
	for (let row = start; row < end; row++) if (!usable || usable(row)) rows[count++] = row;
	return count === rows.length ? rows : rows.slice(0, count);
}

/** At most `cap` rows of a part, drawn by `purpose`, in their old order. */
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

/** Splits `total` into whole numbers proportional to the weights; the rest goes to the largest remainders, earlier ones first. */
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

/** How many epochs are kept: that of the last checkpoint, that of the step, and the next one. */
const EPOCHS_KEPT = 3;

/** Values of the epochs that were used last. */
export class RecentEpochs<Value> {
	private readonly values = new Map<number, Value>();

	/** The value of an epoch, which thereby counts as used. */
	get(epoch: number): Value | undefined {
		const value = this.values.get(epoch);
		if (value !== undefined) this.set(epoch, value);
		return value;
	}

	/** Keeps a value, drops that of the epoch that was used longest ago if there are too many, and returns the value. */
	set(epoch: number, value: Value): Value {
		this.values.delete(epoch);
		this.values.set(epoch, value);
		const [oldest] = this.values.keys();
		if (this.values.size > EPOCHS_KEPT && oldest !== undefined) this.values.delete(oldest);
		return value;
	}
}

/** An order whose epochs are computed by `compute`; it keeps those that were used last. */
function keeping(all: Uint32Array, compute: (epoch: number) => Slices<Uint32Array>): RowOrder {
	const kept = new RecentEpochs<Uint32Array>();
	return {
		rowsPerEpoch: all.length,
		all,
		epoch: (epoch) => kept.get(epoch) ?? kept.set(epoch, atOnce(compute(epoch))),
		prepare: async (epoch) => {
			if (kept.get(epoch) === undefined) kept.set(epoch, await withPauses(compute(epoch)));
		},
	};
}

/**
 * Without a mixture every epoch has every usable row once.
 *
 * With a mixture an epoch has as many rows as are usable in all, and each part contributes its share. A part is read as an
 * endless stream of its permutations, in which each epoch continues where the last one stopped: no row comes a second time
 * before every other row of its part has come once.
 */
export function createOrder(options: OrderOptions): RowOrder {
	const { rows, seed, strategy, usable, mixture, caps } = options;
	const random = strategy === "random";
	if (!mixture) {
		const all = caps ? concat(partsOf(options, caps.rows)) : usableRows(0, rows, usable);
		return keeping(all, function* (epoch) {
			return random ? yield* shuffling(all.slice(), `arl order ${seed} ${epoch}`) : all;
		});
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
	return keeping(concat(parts), function* (epoch) {
		const chosen = new Uint32Array(total);
		let at = 0;
		for (const [i, part] of parts.entries()) {
			const count = counts[i] as number;
			const purpose = random ? (cycle: number) => `arl mixture ${seed} ${i} ${cycle}` : null;
			yield* takeFromStream(part, epoch * count, chosen.subarray(at, at + count), purpose);
			at += count;
		}
		return random ? yield* shuffling(chosen, `arl order ${seed} ${epoch}`) : chosen;
	});
}

/** Fills `into` from position `from` of the endless stream of permutations of `part`. `purpose` null: all are `part` itself. */
function* takeFromStream(
	part: Uint32Array,
	from: number,
	into: Uint32Array,
	purpose: ((cycle: number) => string) | null,
): Slices<void> {
	let done = 0;
	while (done < into.length) {
		const cycle = Math.floor((from + done) / part.length);
		const inCycle = (from + done) % part.length;
		const take = Math.min(part.length - inCycle, into.length - done);
		const values = purpose === null ? part : yield* shuffling(part.slice(), purpose(cycle));
		into.set(values.subarray(inCycle, inCycle + take), done);
		done += take;
	}
}
