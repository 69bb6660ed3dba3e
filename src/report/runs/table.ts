/**
 * Metrics by step in bounded memory, however many lines there are. Neighbouring lines share a bucket, which keeps the mean, the
 * lowest and the highest value of each metric, so that a spike of one step is seen among a million. First, last, lowest and
 * highest values of each metric are exact.
 */

/** A metric's value at a step. */
export interface Point {
	step: number;
	value: number;
}

/** What is known of one metric over all lines. */
export interface Extent {
	first: Point;
	last: Point;
	/** The first of the lowest values, and of the highest. */
	lowest: Point;
	highest: Point;
	/** Sum of all values, and their number. */
	sum: number;
	count: number;
}

/** One metric: a number for each bucket, null where the bucket has no value. */
export interface Curve {
	mean: (number | null)[];
	/** Absent where each bucket has one line, so that they equal the mean. */
	low?: (number | null)[];
	high?: (number | null)[];
}

/** All metrics, by the last step of each bucket. */
export interface Curves {
	steps: number[];
	metrics: Record<string, Curve>;
}

/** Metrics beyond this number are left out: a page with more curves cannot be read. */
const MOST_METRICS = 64;

interface Column {
	/** Of each bucket. */
	sums: number[];
	counts: number[];
	lows: number[];
	highs: number[];
	extent: Extent;
}

/** Lines of metrics, in at most `2 * buckets` buckets. */
export class MetricsTable {
	readonly #most: number;
	readonly #columns = new Map<string, Column>();
	#steps: number[] = [];
	/** Lines of a full bucket: a power of two. */
	#linesEach = 1;
	/** Lines in the last bucket. */
	#linesInLast = 0;

	/** `buckets`: the fewest that a long run is divided into. */
	constructor(buckets: number) {
		this.#most = 2 * buckets;
	}

	get empty(): boolean {
		return this.#steps.length === 0;
	}

	get names(): string[] {
		return [...this.#columns.keys()];
	}

	/** Adds a line. Values that are not finite are left out. */
	add(step: number, values: Iterable<readonly [string, number]>): void {
		if (this.#steps.length === 0 || this.#linesInLast === this.#linesEach) this.#open();
		const bucket = this.#steps.length - 1;
		this.#steps[bucket] = step;
		this.#linesInLast += 1;
		for (const [name, value] of values) {
			if (!Number.isFinite(value)) continue;
			const column = this.#columns.get(name) ?? this.#addColumn(name, { step, value });
			if (column !== null) addValue(column, bucket, { step, value });
		}
	}

	/** What is known of the metric `name`; undefined: no line has it. */
	extent(name: string): Extent | undefined {
		return this.#columns.get(name)?.extent;
	}

	/**
	 * The metrics `names` as curves of at most `most` points each, and five significant digits. `spread`: those with the lowest
	 * and highest value of each bucket.
	 */
	curves(names: readonly string[], most: number, spread: readonly string[] = []): Curves {
		let width = 1;
		while (Math.ceil(this.#steps.length / width) > most) width *= 2;
		const starts = Array.from({ length: Math.ceil(this.#steps.length / width) }, (_, i) => i * width);
		const ends = starts.map((start) => Math.min(start + width, this.#steps.length));
		const metrics: Record<string, Curve> = {};
		for (const name of names) {
			const column = this.#columns.get(name);
			if (column === undefined) continue;
			const { sums, counts, lows, highs } = column;
			const each = (of: (from: number, to: number) => number) =>
				starts.map((from, i) => rounded(of(from, ends[i] as number)));
			const total = (values: number[], from: number, to: number) =>
				values.slice(from, to).reduce((sum, value) => sum + value, 0);
			metrics[name] = { mean: each((from, to) => total(sums, from, to) / total(counts, from, to)) };
			if (!spread.includes(name) || this.#linesEach * width === 1) continue;
			metrics[name].low = each((from, to) => Math.min(...lows.slice(from, to)));
			metrics[name].high = each((from, to) => Math.max(...highs.slice(from, to)));
		}
		return { steps: ends.map((end) => this.#steps[end - 1] as number), metrics };
	}

	/** Opens the next bucket; where there are as many as may be, each two become one before. */
	#open(): void {
		if (this.#steps.length === this.#most) this.#halve();
		this.#steps.push(0);
		this.#linesInLast = 0;
		for (const column of this.#columns.values()) pushEmpty(column);
	}

	#halve(): void {
		const pairs = <T>(values: T[], join: (a: T, b: T) => T) =>
			Array.from({ length: values.length / 2 }, (_, i) => join(values[2 * i] as T, values[2 * i + 1] as T));
		const sum = (a: number, b: number) => a + b;
		this.#steps = pairs(this.#steps, (_, last) => last);
		this.#linesEach *= 2;
		for (const column of this.#columns.values()) {
			column.sums = pairs(column.sums, sum);
			column.counts = pairs(column.counts, sum);
			column.lows = pairs(column.lows, Math.min);
			column.highs = pairs(column.highs, Math.max);
		}
	}

	#addColumn(name: string, point: Point): Column | null {
		if (this.#columns.size === MOST_METRICS) return null;
		const extent = { first: point, last: point, lowest: point, highest: point, sum: 0, count: 0 };
		const column: Column = { sums: [], counts: [], lows: [], highs: [], extent };
		for (let i = 0; i < this.#steps.length; i++) pushEmpty(column);
		this.#columns.set(name, column);
		return column;
	}
}

function pushEmpty({ sums, counts, lows, highs }: Column): void {
	sums.push(0);
	counts.push(0);
	lows.push(Number.POSITIVE_INFINITY);
	highs.push(Number.NEGATIVE_INFINITY);
}

function addValue({ sums, counts, lows, highs, extent }: Column, bucket: number, point: Point): void {
	const { value } = point;
	sums[bucket] = (sums[bucket] ?? 0) + value;
	counts[bucket] = (counts[bucket] ?? 0) + 1;
	lows[bucket] = Math.min(lows[bucket] ?? value, value);
	highs[bucket] = Math.max(highs[bucket] ?? value, value);
	extent.last = point;
	if (value < extent.lowest.value) extent.lowest = point;
	if (value > extent.highest.value) extent.highest = point;
	extent.sum += value;
	extent.count += 1;
}

/** Five significant digits, which no plot can show more of; null where a bucket has no value. */
function rounded(value: number): number | null {
	return Number.isFinite(value) ? Number(value.toPrecision(5)) : null;
}
