/**
 * Has rows encoded ahead of training, in the order in which it needs them, and waits for those that a step needs.
 * Rows are bytes here: the core parses, renders and tokenizes them.
 */
import { isUtf8 } from "node:buffer";
import { toArlError } from "../../errors.js";
import type { NativeTokenCache, RowImage } from "../../native.js";
import { explainRow } from "../sources/explain.js";
import { strayExtendedJson } from "../sources/read-extended.js";
import { maxRowBytes, rowTooLarge } from "../sources/row-size.js";
import { type AnySource, type RowContent, takeRows } from "../sources/source.js";
import { NoteReport } from "./notes.js";
import { type Pictures, rowImage } from "./pictures.js";
import { type BadRow, badRowsError } from "./problems.js";

/** Bad rows that are parsed again to explain what is wrong; more would take too long. */
const EXPLAINED = 1000;
const BATCH_ROWS = 256;
const BATCH_BYTES = 8 * 1024 * 1024;

/** What this process has encoded. */
export interface FillCounts {
	rows: number;
	tokens: number;
	targetTokens: number;
	truncated: number;
	dropped: number;
	/** Images that were measured. */
	images: number;
}

export interface PrefetchOptions {
	source: AnySource;
	cache: NativeTokenCache;
	/** Every row that training will need, each once, soonest first. */
	order: Uint32Array;
	/** Absent or null: no images are trained. */
	pictures?: Pictures | null;
	/** What to do about rows with images that are not trained; absent: the usual. */
	imageHint?: string | undefined;
}

const MISSING = 0;
const PRESENT = 1;
const UNUSABLE = 2;
/** Its tokens are in the cache, and it must be compared with the row of the earlier part. */
const UNCHECKED = 3;

/** Rows read ahead. */
interface Batch {
	rows: Uint8Array[];
	indexes: number[];
	/** The images of each row; null: none are trained. */
	images: RowImage[][] | null;
	/** Rows that are not even encoded. */
	bad: BadRow[];
	/** Rows whose tokens are in the cache, and that have not changed. */
	checked: number[];
}

/** Encodes the rows of one source into one cache. */
export class TokenPrefetcher {
	readonly counts: FillCounts = { rows: 0, tokens: 0, targetTokens: 0, truncated: 0, dropped: 0, images: 0 };
	readonly bad: BadRow[] = [];
	readonly source: AnySource;
	/** Notes on the rows that are in the cache. */
	readonly notes: NoteReport;
	/** Rows of the order that an earlier run has not left in the cache. */
	readonly pending: number;
	/** Seconds from the start to the end, or until now. */
	get seconds(): number {
		return ((this.ended ?? performance.now()) - this.started) / 1000;
	}
	private started = performance.now();
	private ended: number | null = null;
	private readonly state: Uint8Array;
	private readonly order: Uint32Array;
	private readonly ahead: number;
	/** Place of each row in the order; empty where rows need not be asked for. */
	private readonly positions: Uint32Array;
	/** Rows of the order that training has reached. */
	private reached = 0;
	private next = 0;
	private resume: (() => void) | null = null;
	private stopped = false;
	private strict = false;
	private failure: unknown = null;
	private done = false;
	private running: Promise<void> | null = null;
	private waiters: (() => void)[] = [];

	constructor(private readonly options: PrefetchOptions) {
		const { source, cache, order } = options;
		this.source = source;
		this.notes = new NoteReport(cache, source);
		this.state = new Uint8Array(source.length);
		const lengths = cache.lengths();
		const found = source.lazy?.recheck ? UNCHECKED : PRESENT;
		for (let row = 0; row < source.length; row++) if (lengths[row]) this.state[row] = found;
		this.order = order.filter((row) => this.state[row] !== PRESENT);
		this.pending = this.order.length;
		this.ahead = source.lazy?.ahead ?? Number.POSITIVE_INFINITY;
		this.positions = new Uint32Array(Number.isFinite(this.ahead) ? source.length : 0);
		if (this.positions.length > 0) for (const [at, row] of this.order.entries()) this.positions[row] = at;
		if (this.pending === 0) this.done = true;
	}

	/** Rows of the order that were read. */
	get taken(): number {
		return this.next;
	}

	/** The limit of rows ahead of training is reached: more are read when training proceeds. */
	get full(): boolean {
		return this.resume !== null;
	}

	/** All rows are done. */
	get complete(): boolean {
		return this.done;
	}

	/** Starts in the background. A failure surfaces in `check` and `ready`. */
	start(): void {
		if (this.running || this.done) return;
		this.started = performance.now();
		this.running = this.pump()
			.catch((error: unknown) => {
				this.failure = error;
			})
			.finally(() => this.wake());
	}

	/** Makes the first bad row a failure from now on. */
	failOnBadRows(): void {
		this.strict = true;
		if (this.bad.length > 0) this.failure ??= this.badRows();
	}

	/** The error for the bad rows found so far. */
	badRows(): Error {
		return badRowsError(this.bad, this.counts.rows);
	}

	/** Throws the failure, if there was one. */
	check(): void {
		if (this.failure !== null) throw this.failure;
	}

	/** Resolves when another batch is encoded, or all are, or one failed. */
	async progress(): Promise<void> {
		if (this.done || this.failure !== null) return;
		await new Promise<void>((resolve) => this.waiters.push(resolve));
	}

	/** Resolves when all of `rows` are in the cache. Throws the failure that prevents it. */
	async ready(rows: Uint32Array): Promise<void> {
		for (;;) {
			this.check();
			if (this.done || rows.every((row) => this.state[row] !== MISSING && this.state[row] !== UNCHECKED)) return;
			if (this.positions.length > 0) for (const row of rows) this.reach((this.positions[row] as number) + 1);
			await this.progress();
		}
	}

	/** Training has reached the first `count` rows of the order: rows are read as far ahead of that as allowed. */
	reach(count: number): void {
		if (count <= this.reached) return;
		this.reached = count;
		this.resume?.();
	}

	/** Stops after the batch in progress. */
	async stop(): Promise<void> {
		this.stopped = true;
		this.source.lazy?.cancel();
		this.resume?.();
		await this.running;
	}

	/** Forces what was encoded to the disk. */
	sync(): void {
		this.source.lazy?.sync();
		this.options.cache.sync();
	}

	private wake(): void {
		const { waiters } = this;
		this.waiters = [];
		for (const resolve of waiters) resolve();
	}

	private async pump(): Promise<void> {
		let ahead = this.readBatch();
		while (!this.stopped) {
			const batch = await ahead;
			if (batch === null) break;
			ahead = this.readBatch();
			// A failure surfaces where the batch is awaited; until then it must not count as unhandled.
			ahead.catch(() => {});
			await this.fill(batch);
			if (this.strict && this.bad.length > 0) throw this.badRows();
			this.wake();
		}
		await ahead.catch((error: unknown) => {
			if (!this.stopped) throw error;
		});
		if (this.stopped) return;
		this.sync();
		this.ended = performance.now();
		this.done = true;
	}

	private async fill({ rows, indexes, images, bad, checked }: Batch): Promise<void> {
		const { source } = this;
		const { cache } = this.options;
		this.bad.push(...bad);
		for (const { row } of bad) this.state[row] = UNUSABLE;
		for (const row of checked) this.state[row] = PRESENT;
		this.counts.rows += bad.length + checked.length;
		if (indexes.length === 0) return;
		const places = Uint32Array.from(indexes);
		const report = images === null ? await cache.fill(rows, places) : await cache.fill(rows, places, images);
		for (const row of indexes) this.state[row] = PRESENT;
		for (const { row, reason, message } of report.problems) {
			this.state[row] = UNUSABLE;
			const content = this.bad.length < EXPLAINED ? rows[indexes.indexOf(row)] : undefined;
			const better = content && explainRow(content, message);
			const { imageHint: hint } = this.options;
			const more = reason === "image" && hint !== undefined ? { hint } : {};
			this.bad.push({ row, location: source.location(row), reason, message: better ?? message, ...more });
		}
		this.counts.rows += indexes.length;
		this.counts.tokens += report.tokens;
		this.counts.targetTokens += report.targetTokens;
		this.counts.truncated += report.truncated;
		this.counts.dropped += report.dropped;
		this.counts.images += images?.reduce((sum, { length }) => sum + length, 0) ?? 0;
	}

	/** Resolves when training is near enough for more rows to be read. */
	private async room(): Promise<void> {
		while (!this.stopped && this.next < this.order.length && this.next >= this.reached + this.ahead) {
			const more = new Promise<void>((resolve) => {
				this.resume = resolve;
			});
			this.wake();
			await more;
			this.resume = null;
		}
	}

	/** Reads the next rows of the order; null: none is left. */
	private async readBatch(): Promise<Batch | null> {
		const { source } = this;
		await this.room();
		if (this.stopped) return null;
		const most = Math.min(this.order.length, this.next + BATCH_ROWS, this.reached + this.ahead);
		const batch: Batch = { rows: [], indexes: [], images: null, bad: [], checked: [] };
		const refuse = (row: number, fault: Fault) => batch.bad.push({ row, location: source.location(row), ...fault });
		// Rows that are known to be too large are not read.
		let wanted = this.next;
		while (wanted < most && source.bytes(this.order[wanted] as number) <= maxRowBytes()) wanted += 1;
		const asked = this.order.subarray(this.next, wanted);
		const taken = asked.length > 0 ? await takeRows(source, asked, BATCH_BYTES) : [];
		if (taken.length === 0 && wanted === most) return null;
		for (const [i, content] of taken.entries()) {
			const row = asked[i] as number;
			const fault = faultOf(content, this.state[row] === UNCHECKED);
			if (fault !== null) refuse(row, fault);
			else if (this.state[row] === UNCHECKED) {
				batch.checked.push(row);
				await this.options.pictures?.found(row, content as Uint8Array);
			} else {
				batch.rows.push(content as Uint8Array);
				batch.indexes.push(row);
			}
		}
		this.next += taken.length;
		if (taken.length === asked.length && wanted < most) {
			const row = this.order[this.next++] as number;
			refuse(row, rowTooLarge(source.bytes(row)));
		}
		return this.measured(batch);
	}

	/** The batch with the images of its rows, and without the rows whose images cannot be used. */
	private async measured(batch: Batch): Promise<Batch> {
		const { source } = this;
		const { pictures } = this.options;
		if (!pictures) return batch;
		const found = await Promise.all(
			batch.rows.map(async (content, i): Promise<RowImage[] | BadRow> => {
				const row = batch.indexes[i] as number;
				try {
					return (await pictures.measure(row, content)).map(rowImage);
				} catch (error) {
					const { code, message, hint } = toArlError(error);
					if (code !== "ARL_DATA") throw error;
					return { row, location: source.location(row), reason: "image", message, hint };
				}
			}),
		);
		const good = [...found.keys()].filter((i) => Array.isArray(found[i]));
		return {
			...batch,
			rows: good.map((i) => batch.rows[i] as Uint8Array),
			indexes: good.map((i) => batch.indexes[i] as number),
			images: good.map((i) => found[i] as RowImage[]),
			bad: [...batch.bad, ...found.filter((one): one is BadRow => !Array.isArray(one))],
		};
	}
}

type Fault = Omit<BadRow, "row" | "location">;

/** Why a row is not encoded; null: it is. `encoded`: its tokens are in the cache. */
function faultOf(content: RowContent, encoded: boolean): Fault | null {
	if (!(content instanceof Uint8Array)) return { reason: content.reason, message: content.message };
	if (content.length > maxRowBytes()) return rowTooLarge(content.length);
	if (!isUtf8(content)) return { reason: "wrong encoding", message: notUtf8(content) };
	return encoded ? null : strayExtendedJson(content);
}

/** Says where the bytes stop being UTF-8. */
function notUtf8(bytes: Uint8Array): string {
	const text = new TextDecoder().decode(bytes);
	let offset = 0;
	let from = 0;
	// Each fault is decoded as U+FFFD; one that the text itself contains is passed over.
	for (let at = text.indexOf("\uFFFD"); at >= 0; at = text.indexOf("\uFFFD", from)) {
		offset += Buffer.byteLength(text.slice(from, at));
		from = at;
		if (bytes[offset] !== 0xef || bytes[offset + 1] !== 0xbf || bytes[offset + 2] !== 0xbd) break;
		offset += 3;
		from += 1;
	}
	const before = text.slice(Math.max(0, from - 24), from);
	const byte = (bytes[offset] ?? 0).toString(16).padStart(2, "0");
	return `the row is not UTF-8: byte 0x${byte} at ${offset} after ${JSON.stringify(before)}`;
}
