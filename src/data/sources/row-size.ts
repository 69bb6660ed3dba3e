/** The bound of a row's size: one for everything that reads or writes rows, and the core's. */
import { loadNative } from "../../native.js";

let bound: number | null = null;

/** A row with more bytes than this is refused. */
export function maxRowBytes(): number {
	bound ??= loadNative().MAX_ROW_BYTES;
	return bound;
}

const MIB = 1024 * 1024;

/** What is said of a row that is too large. */
export function rowTooLarge(bytes: number): { reason: string; message: string } {
	// Rounded away from the bound, so that no row of 32 MiB is refused because 32 MiB are allowed.
	const size = Math.ceil((bytes / MIB) * 10) / 10;
	return { reason: "row too large", message: `${size} MiB in one row; at most ${maxRowBytes() / MIB} MiB are read` };
}
