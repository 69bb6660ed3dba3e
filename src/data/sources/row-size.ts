/** The limit on a row's size, which is the core's: one for everything that reads or writes rows. */
import { loadNative } from "../../native.js";

let limit: number | null = null;

/** A row with more bytes than this is refused. */
export function maxRowBytes(): number {
	limit ??= loadNative().MAX_ROW_BYTES;
	return limit;
}

const MIB = 1024 * 1024;

/** The reason and message for a row that is too large. */
export function rowTooLarge(bytes: number): { reason: string; message: string } {
	// Rounded up, so that no message says that 32 MiB are too much where 32 MiB are allowed.
	const size = Math.ceil((bytes / MIB) * 10) / 10;
	return { reason: "row too large", message: `${size} MiB in one row; at most ${maxRowBytes() / MIB} MiB are read` };
}
