/** Writing to files that are open. Knows nothing of what is written. */
import { writeSync } from "node:fs";

/** Writes all of `bytes`, at `position` or, absent, at the file's place: the system may take a part of them at a time. */
export function writeAll(file: number, bytes: Uint8Array, position: number | null = null): void {
	for (let written = 0; written < bytes.length; ) {
		const at = position === null ? null : position + written;
		written += writeSync(file, bytes, written, bytes.length - written, at);
	}
}
