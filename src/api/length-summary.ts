/** Many lengths in a few numbers and a histogram. */

/** Rows whose length is `from` or more and below `to`. */
export interface Bin {
	from: number;
	to: number;
	rows: number;
}

/** Lengths in tokens. Everything is 0 if there are no rows. */
export interface LengthSummary {
	sum: number;
	min: number;
	median: number;
	p95: number;
	max: number;
	histogram: Bin[];
}

const MOST_BINS = 12;
/** If the longest is more than so many times the shortest, each bin is twice as wide as the one before. */
const WIDE = 30;

/** The smallest value that at least this share of the sorted values does not exceed. */
function quantile(sorted: Uint32Array, part: number): number {
	return sorted[Math.max(0, Math.ceil(part * sorted.length) - 1)] ?? 0;
}

/** Summarizes lengths. */
export function summarize(lengths: Uint32Array): LengthSummary {
	const sorted = lengths.slice().sort();
	const min = sorted[0] ?? 0;
	const max = sorted.at(-1) ?? 0;
	return {
		sum: sorted.reduce((sum, length) => sum + length, 0),
		min,
		median: quantile(sorted, 0.5),
		p95: quantile(sorted, 0.95),
		max,
		histogram: sorted.length === 0 ? [] : histogram(sorted, edges(min, max, binsFor(sorted.length))),
	};
}

/** Sturges' number of bins, within bounds. */
function binsFor(rows: number): number {
	return Math.min(MOST_BINS, 1 + Math.ceil(Math.log2(rows)));
}

/** Bounds of the bins: of equal, round width, or each twice as wide as the one before if lengths differ much. */
function edges(min: number, max: number, bins: number): number[] {
	if (max > WIDE * Math.max(1, min)) {
		const found = [2 ** Math.floor(Math.log2(Math.max(1, min)))];
		while ((found.at(-1) as number) <= max) found.push(2 * (found.at(-1) as number));
		if (min === 0) found.unshift(0);
		return found;
	}
	const exact = Math.max(1, (max + 1 - min) / bins);
	const scale = 10 ** Math.floor(Math.log10(exact));
	const width = scale * ([1, 2, 5, 10].find((step) => step * scale >= exact) ?? 10);
	const found = [Math.floor(min / width) * width];
	while ((found.at(-1) as number) <= max) found.push((found.at(-1) as number) + width);
	return found;
}

function histogram(sorted: Uint32Array, bounds: number[]): Bin[] {
	const bins = bounds.slice(0, -1).map((from, i): Bin => ({ from, to: bounds[i + 1] as number, rows: 0 }));
	let bin = 0;
	for (const length of sorted) {
		while (length >= (bins[bin] as Bin).to) bin += 1;
		(bins[bin] as Bin).rows += 1;
	}
	return bins;
}
