/** Numbers and times as people read them, in few columns. */
import type { DroppedImages } from "../data/tokens/notes.js";

/** A count with a unit prefix: `812`, `12.3k`, `1.20M`. */
export function count(value: number): string {
	if (!Number.isFinite(value)) return String(value);
	const size = Math.abs(value);
	if (size < 999.5) return size < 10 && size % 1 !== 0 ? value.toFixed(1) : value.toFixed(0);
	for (const [unit, scale] of [
		["G", 1e9],
		["M", 1e6],
		["k", 1e3],
	] as const) {
		// 999,500 and up would round to 1000k.
		if (size >= scale * 0.9995) return `${significant(value / scale)}${unit}`;
	}
	return String(value);
}

/** Bytes: `812 B`, `12.3 MiB`, `1.20 GiB` (powers of 1,024). */
export function bytes(value: number): string {
	return inUnit(value, significant);
}

/** Bytes to a tenth of their unit, where amounts are compared: `312.4 MiB` against `312.0 MiB`. */
export function bytesToTenth(value: number): string {
	return inUnit(value, (amount) => amount.toFixed(amount < 10 ? 2 : 1));
}

function inUnit(value: number, text: (amount: number) => string): string {
	if (!Number.isFinite(value)) return String(value);
	const units = ["B", "KiB", "MiB", "GiB", "TiB"];
	let rest = value;
	let unit = 0;
	while (Math.abs(rest) >= 1023.5 && unit < units.length - 1) {
		rest /= 1024;
		unit++;
	}
	return `${unit === 0 ? rest.toFixed(0) : text(rest)} ${units[unit]}`;
}

/** Seconds: `0.42s`, `12s`, `3m05s`, `2h07m`, `3d04h`. */
export function duration(seconds: number): string {
	if (!Number.isFinite(seconds) || seconds < 0) return "?";
	if (seconds < 9.995) return `${seconds.toFixed(seconds < 0.995 ? 2 : 1)}s`;
	const whole = Math.round(seconds);
	if (whole < 60) return `${whole}s`;
	const pair = (big: number, small: number, units: string) =>
		`${big}${units[0]}${String(small).padStart(2, "0")}${units[1]}`;
	if (whole < 3600) return pair(Math.floor(whole / 60), whole % 60, "ms");
	if (whole < 86_400) return pair(Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), "hm");
	return pair(Math.floor(whole / 86_400), Math.floor((whole % 86_400) / 3600), "dh");
}

/** A loss or norm: five significant digits at most, never shorter than four decimals in the usual range. */
export function measure(value: number): string {
	if (!Number.isFinite(value)) return String(value);
	const size = Math.abs(value);
	if (size !== 0 && (size < 0.001 || size >= 100_000)) return value.toExponential(3);
	return size >= 100 ? value.toFixed(2) : value.toFixed(4);
}

/** A learning rate: `2.00e-5`. */
export function rate(value: number): string {
	return value === 0 ? "0" : value.toExponential(2);
}

/** A part of one: `45.1 %`. */
export function percent(value: number): string {
	return `${(100 * value).toFixed(1)} %`;
}

function significant(value: number): string {
	const size = Math.abs(value);
	return value.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
}

/** A value as JSON; numbers that are not finite become strings. */
export function jsonLine(value: unknown): string {
	return JSON.stringify(value, (_, part) => (typeof part === "number" && !Number.isFinite(part) ? String(part) : part));
}

/** Rows in words. */
export function rowsText(rows: number): string {
	return rows === 1 ? "1 row" : `${rows.toLocaleString("en-US")} rows`;
}

/** Image parts that were left out of rows; empty where there were none. */
export function droppedImages(dropped: DroppedImages): string {
	if (dropped.images === 0) return "";
	const images = dropped.images === 1 ? "1 image" : `${dropped.images.toLocaleString("en-US")} images`;
	const messages = dropped.emptied === 1 ? "1 message is" : `${dropped.emptied.toLocaleString("en-US")} messages are`;
	return `${images} of ${rowsText(dropped.rows)} dropped${dropped.emptied === 0 ? "" : ` (${messages} empty)`}`;
}

/** Images of rows, after their number; empty where there are none. */
export function imagesText(images = 0): string {
	if (images === 0) return "";
	return ` with ${images === 1 ? "1 image" : `${images.toLocaleString("en-US")} images`}`;
}
