/**
 * From rows to tokens: the shape of the rows, their token cache, and filling it until the first step may begin.
 */
import { createHash } from "node:crypto";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { within } from "../../data/cancellation.js";
import { explainRow } from "../../data/sources/explain.js";
import type { AnySource } from "../../data/sources/source.js";
import { isAboutImages } from "../../data/tokens/notes.js";
import type { TokenPrefetcher } from "../../data/tokens/prefetch.js";
import { type BadRow, badRowsError, countReasons } from "../../data/tokens/problems.js";
import { makeFolder } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";
import { type FillEvent, notice, type TrainEvent } from "../../events.js";
import type { Native, NativeTextEncoder, NativeTokenCache, TextInfo } from "../../native.js";
import type { CommitHooks } from "../loop/commit-hooks.js";
import { needsAllRows } from "./plan.js";

const FIRST_ROWS = 32;
/** Larger rows need not be read to find the shape. */
const MAX_FIRST_BYTES = 8 * 1024 * 1024;

/** Detects the shape of the rows. Throws with the place of the row if the shape is not known. */
export async function detectShape(
	source: AnySource,
	encoder: NativeTextEncoder,
	wanted: Uint32Array,
	signal: AbortSignal | null,
): Promise<{ shape: string; firstRows: Uint8Array[] }> {
	// A run that is resumed with all its steps done reads no row.
	if (source.lazy && wanted.length === 0) return { shape: "any shape (none is left to train)", firstRows: [] };
	const cancel = () => source.lazy?.cancel();
	if (signal?.aborted) cancel();
	signal?.addEventListener("abort", cancel);
	const { rows, indexes } = await firstRowsOf(source, wanted).finally(() =>
		signal?.removeEventListener("abort", cancel),
	);
	try {
		return { shape: encoder.detect(rows), firstRows: rows };
	} catch (error) {
		const { code, message, hint } = toArlError(error);
		if (code !== "ARL_DATA") throw error;
		// The core counts rows among those that it was given.
		const placed = message.replace(/\brow (\d+)\b/g, (_, row) => source.location(indexes[Number(row)] ?? 0));
		const first = Number(/\brow (\d+)\b/.exec(message)?.[1] ?? 0);
		const better = explainRow(rows[first] ?? new Uint8Array(), message);
		if (better !== null) throw new ArlError(code, `${source.location(indexes[first] ?? 0)}: ${better}`, hint);
		throw new ArlError(code, placed === message ? `${source.location(indexes[0] ?? 0)}: ${message}` : placed, hint);
	}
}

/** The rows that show the shape: the first ones of files, and of rows that are generated on demand those needed first. */
async function firstRowsOf(source: AnySource, wanted: Uint32Array): Promise<{ rows: Uint8Array[]; indexes: number[] }> {
	const { lazy } = source;
	// A stream may be slow: one good row is enough.
	if (lazy?.inOrder) {
		const first = await readGood(source, wanted.subarray(0, 1));
		if (first.rows.length > 0) return first;
	}
	const count = Math.min(FIRST_ROWS, source.length);
	const bad: BadRow[] = [];
	// One usable row shows the shape; bad ones are reported with all rows. Rows that are generated on demand are not searched.
	for (let first = 0; first < (lazy ? 1 : source.length); first += FIRST_ROWS) {
		const asked = lazy
			? wanted.subarray(0, count)
			: Uint32Array.from({ length: Math.min(FIRST_ROWS, source.length - first) }, (_, i) => first + i);
		const found = await readGood(
			source,
			asked.filter((row) => source.bytes(row) <= MAX_FIRST_BYTES),
		);
		bad.push(...found.bad);
		if (found.rows.length > 0 || bad.length === 0) return found;
	}
	throw badRowsError(bad, bad.length);
}

async function readGood(source: AnySource, asked: Uint32Array) {
	const rows: Uint8Array[] = [];
	const indexes: number[] = [];
	const bad: BadRow[] = [];
	const found = await (source.lazy ? source.lazy.peek(asked) : source.read(asked));
	for (const [i, row] of found.entries()) {
		const index = asked[i] as number;
		if (row instanceof Uint8Array) {
			rows.push(row);
			indexes.push(index);
		} else bad.push({ row: index, location: source.location(index), ...row });
	}
	return { rows, indexes, bad };
}

/** The name of a cache: the same rows and text options have the same tokens. */
function cacheKey(source: AnySource, text: TextInfo): string {
	return createHash("sha256")
		.update(`${source.identity}\n${source.length}\n${text.fingerprint}`)
		.digest("hex")
		.slice(0, 32);
}

/** Opens the cache of these rows; one of an earlier run is continued. */
export async function openCache(
	native: Native,
	folder: string,
	source: AnySource,
	encoder: NativeTextEncoder,
	text: TextInfo,
): Promise<NativeTokenCache> {
	await makeFolder(folder).catch((error: unknown) => {
		throw toArlError(error);
	});
	return native.TokenCache.open(folder, cacheKey(source, text), source.length, encoder);
}

/** The progress of the prefetcher, as an event. */
export function fillEvent(args: Pick<AgentTrainingConfig, "images">, prefetcher: TokenPrefetcher): FillEvent {
	const { images, ...counts } = prefetcher.counts;
	return {
		type: "fill",
		...counts,
		...(args.images === "train" && { images }),
		...(args.images === "drop" && { imagesDropped: prefetcher.notes.droppedImages() }),
		totalRows: prefetcher.pending,
		seconds: prefetcher.seconds,
		complete: prefetcher.complete,
	};
}

/** New notes on rows. `images`: also those that a fill event contains. */
export function* noteEvents(prefetcher: TokenPrefetcher, images = false): Generator<TrainEvent, void> {
	for (const note of prefetcher.notes.take()) {
		if (images || !isAboutImages(note)) yield notice(note.level, note.message);
	}
}

/** What must be encoded before the first step. */
export interface FillFirst {
	/** Rows of the order that come before the first step, and must be read nevertheless. */
	replayed: number;
	/** The longest wait for rows that the first step does not need. */
	seconds: number;
	hooks: CommitHooks | null;
	signal: AbortSignal | null;
}

const EVENT_MILLISECONDS = 500;

/**
 * Encodes rows until all are done, or for `seconds` if training may start before. Bad rows found by then end the run, or are
 * reported and left out.
 */
export async function* prefetchFirst(
	args: AgentTrainingConfig,
	prefetcher: TokenPrefetcher,
	{ replayed, seconds, hooks, signal }: FillFirst,
): AsyncGenerator<TrainEvent, void> {
	const started = performance.now();
	const deadline = needsAllRows(args) ? Number.POSITIVE_INFINITY : started + seconds * 1000;
	prefetcher.reach(needsAllRows(args) ? Number.POSITIVE_INFINITY : replayed);
	prefetcher.start();
	let reported = started;
	// Rows that are followed may come hours apart.
	const come = () => args.follow && prefetcher.counts.rows > 0;
	const early = () => prefetcher.taken >= replayed && (prefetcher.full || come() || performance.now() >= deadline);
	while (!prefetcher.complete && !early()) {
		await within(prefetcher.progress(), Math.min(EVENT_MILLISECONDS, Math.max(10, deadline - performance.now())));
		for (const message of hooks?.notices() ?? []) yield notice("warning", message);
		prefetcher.check();
		if (signal?.aborted)
			throw new ArlError("ARL_INTERRUPTED", "interrupted before the first step; nothing was trained");
		if (performance.now() - reported >= EVENT_MILLISECONDS) {
			reported = performance.now();
			yield fillEvent(args, prefetcher);
		}
	}
	prefetcher.check();
	yield fillEvent(args, prefetcher);
	yield* noteEvents(prefetcher);
	if (prefetcher.bad.length > 0) {
		if (args.on_bad_row === "error") throw prefetcher.badRows();
		yield {
			type: "rows_skipped",
			reasons: countReasons(prefetcher.bad),
			rows: prefetcher.bad.map(({ location, reason, message }) => ({ location, reason, message })),
		};
	}
	if (!prefetcher.complete) prefetcher.failOnBadRows();
}
