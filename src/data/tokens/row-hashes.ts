/**
 * Hashes of the rows of a data set without an identity, in a file next to the token cache, so that a resumed run notices if the
 * data set has changed.
 */
import { createHash } from "node:crypto";
import { closeSync, fsyncSync, mkdirSync, openSync, readFileSync } from "node:fs";
import { dirname } from "node:path";
import { writeAll } from "../../disk/write-all.js";
import { ArlError, toArlError } from "../../errors.js";
import type { RowContent } from "../sources/source.js";

const HASH_BYTES = 16;

/** No row is the empty text, so this hash stands for a row that the data set could not give. */
const FAILED = hashOf(new Uint8Array());

function hashOf(row: Uint8Array): Buffer {
	return createHash("sha256").update(row).digest().subarray(0, HASH_BYTES);
}

/** The hashes of the rows of one data set, by row number; zeros for a row that was never read. */
export class RowHashes {
	/** An earlier part of the run has written hashes. */
	readonly found: boolean;
	private readonly known: Buffer;
	private readonly file: number;
	private closed = false;

	/** `failuresCount`: rows that the data set cannot give are part of its content, because the run skips them. */
	constructor(
		private readonly path: string,
		private readonly failuresCount: boolean,
	) {
		try {
			mkdirSync(dirname(path), { recursive: true });
			this.file = openSync(path, "a+");
			this.known = readFileSync(this.file);
			closeSync(this.file);
			// A file that is opened for appending gets every hash at its end.
			this.file = openSync(path, "r+");
		} catch (error) {
			throw toArlError(error);
		}
		this.found = this.known.length > 0;
	}

	/** Records a row. Throws `ARL_STATE` if the earlier part of the run has read another one at this place. */
	note(index: number, row: RowContent, location: string): void {
		const at = index * HASH_BYTES;
		const before = this.known.subarray(at, at + HASH_BYTES);
		const isKnown = before.length === HASH_BYTES && before.some((byte) => byte !== 0);
		// The missing row ends the run, and may exist when the run is resumed.
		if (!(row instanceof Uint8Array) && !isKnown && !this.failuresCount) return;
		const hash = row instanceof Uint8Array ? hashOf(row) : FAILED;
		if (isKnown) {
			if (!before.equals(hash)) throw changed(row, location);
			return;
		}
		try {
			writeAll(this.file, hash, at);
		} catch (error) {
			throw toArlError(error, this.path);
		}
	}

	/** Forces the hashes to the disk. */
	sync(): void {
		if (this.closed) return;
		try {
			fsyncSync(this.file);
		} catch (error) {
			throw toArlError(error, this.path);
		}
	}

	close(): void {
		if (!this.closed) closeSync(this.file);
		this.closed = true;
	}
}

function changed(row: RowContent, location: string): ArlError {
	if (!(row instanceof Uint8Array)) {
		const message = `${location}: the earlier part of this run has read this row, and now: ${row.reason}: ${row.message}`;
		return new ArlError("ARL_STATE", message, "Resume the run once the row can be read again.");
	}
	return new ArlError(
		"ARL_STATE",
		`${location}: the row is not the one that the earlier part of this run has read there: the data set has changed`,
		"Give the same rows in the same order each time, or start from scratch with another output_dir.",
	);
}
