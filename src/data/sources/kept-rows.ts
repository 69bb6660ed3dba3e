/**
 * Rows that are needed again after a source has given them for the only time: appended to files without a name, each of which is
 * freed once none of its rows is needed any more.
 */
import { type FileHandle, open, rm } from "node:fs/promises";
import { toArlError } from "../../errors.js";
import type { Scratch } from "./scratch.js";

/** A file is not appended to beyond this size, unless one row is larger. */
const SEGMENT_BYTES = 64 * 1024 * 1024;

interface Segment {
	file: FileHandle;
	size: number;
	/** Rows in it that are still needed. */
	live: number;
}

interface Place {
	segment: Segment;
	offset: number;
	length: number;
}

/** Rows by their number, on disk. */
export class KeptRows {
	private readonly places = new Map<number, Place>();
	private readonly segments = new Set<Segment>();
	private current: Segment | null = null;
	/** Writing is in the order of the calls. */
	private writing: Promise<unknown> = Promise.resolve();

	constructor(private readonly scratch: Scratch) {}

	/** Bytes in all files. */
	get bytes(): number {
		let sum = 0;
		for (const { size } of this.segments) sum += size;
		return sum;
	}

	/** Keeps a row; a row that is kept already stays as it is. */
	keep(row: number, content: Uint8Array): Promise<void> {
		const kept = this.writing.then(() => this.write(row, content));
		this.writing = kept.catch(() => {});
		return kept;
	}

	private async write(row: number, content: Uint8Array): Promise<void> {
		if (this.places.has(row)) return;
		try {
			const segment = await this.room(content.length);
			const offset = segment.size;
			for (let done = 0; done < content.length; ) {
				const { bytesWritten } = await segment.file.write(content, done, content.length - done, offset + done);
				done += bytesWritten;
			}
			segment.size += content.length;
			segment.live += 1;
			this.places.set(row, { segment, offset, length: content.length });
		} catch (error) {
			throw toArlError(error);
		}
	}

	/** A file that has room for so many bytes. */
	private async room(length: number): Promise<Segment> {
		const { current } = this;
		if (current !== null && (current.size === 0 || current.size + length <= SEGMENT_BYTES)) return current;
		if (current !== null && current.live === 0) await this.free(current);
		const path = this.scratch.newFile();
		const segment = { file: await open(path, "wx+"), size: 0, live: 0 };
		// The open handle keeps the content, and a killed process leaves nothing behind.
		await rm(path);
		this.segments.add(segment);
		this.current = segment;
		return segment;
	}

	/** A row that was kept; null: it was not. */
	async read(row: number): Promise<Uint8Array | null> {
		await this.writing;
		const place = this.places.get(row);
		if (place === undefined) return null;
		const content = new Uint8Array(place.length);
		try {
			for (let done = 0; done < content.length; ) {
				const { bytesRead } = await place.segment.file.read(content, done, content.length - done, place.offset + done);
				if (bytesRead === 0) return null;
				done += bytesRead;
			}
		} catch (error) {
			throw toArlError(error);
		}
		return content;
	}

	/** The row is not needed any more. */
	async forget(row: number): Promise<void> {
		const place = this.places.get(row);
		if (place === undefined) return;
		this.places.delete(row);
		place.segment.live -= 1;
		if (place.segment.live === 0 && place.segment !== this.current) await this.free(place.segment);
	}

	private async free(segment: Segment): Promise<void> {
		if (!this.segments.delete(segment)) return;
		await segment.file.close();
	}

	async close(): Promise<void> {
		await this.writing;
		for (const segment of [...this.segments]) await this.free(segment);
	}
}
