/**
 * JSON text that keeps what JavaScript's own loses: a float stays a float. Sources that decode values (a database's documents,
 * Parquet columns) write their rows with this, so that they render like the same rows of a JSONL file.
 */

/**
 * A float64 as JSON text that reads back as a float and never as an integer: `1.0` and not `1`. Throws a RangeError for NaN and
 * the infinities, for which JSON has no text.
 */
export function floatText(value: number): string {
	if (!Number.isFinite(value)) throw new RangeError(`${value} has no JSON text`);
	if (Object.is(value, -0)) return "-0.0";
	const text = String(value);
	return /[.e]/.test(text) ? text : `${text}.0`;
}

/**
 * Milliseconds since 1970 as a date in ISO 8601, as JavaScript writes it; null outside the years that it can write.
 */
export function dateText(milliseconds: number): string | null {
	const date = new Date(milliseconds);
	return Number.isNaN(date.getTime()) ? null : date.toISOString();
}

/** The value of a JSON text; undefined: it is not JSON. */
export function parsed(text: string): unknown {
	try {
		return JSON.parse(text);
	} catch {
		return undefined;
	}
}
