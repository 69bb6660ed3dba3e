/** What a user should know of the values of Parquet columns, counted by top-level column while rows are read. */
import type { ColumnCount } from "../../../native.js";

type Counts = Map<string, number>;

function add(counts: Counts, more: readonly ColumnCount[]): void {
	for (const { column, count } of more) counts.set(column, (counts.get(column) ?? 0) + count);
}

function shown(counts: Counts): string {
	return [...counts].map(([column, count]) => `${count.toLocaleString("en")} in ${column}`).join(", ");
}

/** The remarks on all files of a source. */
export class Remarks {
	private readonly nulls: Counts = new Map();
	private readonly numbers: Counts = new Map();

	/** Of one file: nulls inside of structs that were read as absent keys, and floats that are NaN or infinite. */
	add(leftOut: readonly ColumnCount[], notFinite: readonly ColumnCount[]): void {
		add(this.nulls, leftOut);
		add(this.numbers, notFinite);
	}

	/** A sentence for each kind of remark. */
	lines(): string[] {
		const lines: string[] = [];
		if (this.nulls.size > 0) {
			lines.push(`nulls inside of Parquet structs are read as absent keys: ${shown(this.nulls)}`);
		}
		if (this.numbers.size > 0) {
			lines.push(`rows with NaN or infinity, for which JSON has no number, cannot be used: ${shown(this.numbers)}`);
		}
		return lines;
	}
}
