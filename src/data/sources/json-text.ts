/**
 * JSON text that keeps what JavaScript's own loses: a float stays a float. Every source that decodes values (a database's
 * documents, Parquet columns) writes its rows with this, so that they render like the same rows of a JSONL file.
 */

/**
 * A float64 as JSON text that reads back as a float and never as an integer: `1.0` and not `1`. Throws a RangeError for what
 * JSON has no text for: NaN and the infinities.
 */
export function floatText(value: number): string {
	if (!Number.isFinite(value)) throw new RangeError(`${value} has no JSON text`);
	if (Object.is(value, -0)) return "-0.0";
	const text = String(value);
	return /[.e]/.test(text) ? text : `${text}.0`;
}

/**
 * Milliseconds since 1970 as the text of a date, as JavaScript writes it; null beyond the years that have such a text.
 */
export function dateText(milliseconds: number): string | null {
	const date = new Date(milliseconds);
	return Number.isNaN(date.getTime()) ? null : date.toISOString();
}
