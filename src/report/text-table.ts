/** Tables of text for terminals. */

/** A table's rows as lines: columns two spaces apart, those in `right` (by index) aligned to the right. */
export function textTable(rows: readonly (readonly string[])[], right: readonly number[] = []): string[] {
	const widths: number[] = [];
	for (const row of rows) for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, cell.length);
	return rows.map((row) =>
		row
			.map((cell, i) => (right.includes(i) ? cell.padStart(widths[i] ?? 0) : cell.padEnd(widths[i] ?? 0)))
			.join("  ")
			.trimEnd(),
	);
}
