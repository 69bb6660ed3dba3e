/** Writes to open files. */
import { writeSync } from "node:fs";

/** Writes all of `bytes`, at `position` or else at the current position: a single write may be partial. */
export function writeAll(file: number, bytes: Uint8Array, position: number | null = null): void {
	for (let written = 0; written < bytes.length; ) {
		const at = position === null ? null : position + written;
		written += writeSync(file, bytes, written, bytes.length - written, at);
	}
}
