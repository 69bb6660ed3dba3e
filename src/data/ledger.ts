/**
 * What is known of rows that cannot be read again for nothing: a hash of each row that was read, in a file beside the token
 * cache, so that a resumed run notices a data set that has changed.
 */
import { createHash } from "node:crypto";
import { closeSync, fsyncSync, mkdirSync, openSync, readFileSync, writeSync } from "node:fs";
import { dirname } from "node:path";
import { ArlError, toArlError } from "../errors.js";
import { RowFailure } from "./source.js";

const HASH_BYTES = 16;

function hashOf(row: Uint8Array | RowFailure): Buffer {
	// No row is the empty text, so that a row which could not be had is like no other.
	const bytes = row instanceof RowFailure ? new Uint8Array() : row;
	return createHash("sha256").update(bytes).digest().subarray(0, HASH_BYTES);
}

/** The hashes of the rows of one data set, by row number; zeros stand for a row that was never read. */
export class RowLedger {
	/** An earlier part of the run has left hashes. */
	readonly found: boolean;
	private readonly known: Buffer;
	private readonly file: number;
	private closed = false;

	constructor(path: string) {
		try {
			mkdirSync(dirname(path), { recursive: true });
			this.file = openSync(path, "a+");
			this.known = readFileSync(this.file);
			closeSync(this.file);
			// Opened to append, the system would write every hash at the end.
			this.file = openSync(path, "r+");
		} catch (error) {
			throw toArlError(error);
		}
		this.found = this.known.length > 0;
	}

	/** Notes a row. Throws `ARL_STATE` where the earlier part of the run has read another one at this place. */
	note(index: number, row: Uint8Array | RowFailure, location: string): void {
		const hash = hashOf(row);
		const at = index * HASH_BYTES;
		const before = this.known.subarray(at, at + HASH_BYTES);
		if (before.length === HASH_BYTES && before.some((byte) => byte !== 0)) {
			if (before.equals(hash)) return;
			throw new ArlError(
				"ARL_STATE",
				`${location}: the row is not the one that the earlier part of this run has read there: the data set has changed`,
				"Give the same rows in the same order each time, or start anew with another output_dir.",
			);
		}
		try {
			writeSync(this.file, hash, 0, HASH_BYTES, at);
		} catch (error) {
			throw toArlError(error);
		}
	}

	/** The hashes are on the disk from here on, also if the machine stops. */
	sync(): void {
		if (!this.closed) fsyncSync(this.file);
	}

	close(): void {
		if (!this.closed) closeSync(this.file);
		this.closed = true;
	}
}
