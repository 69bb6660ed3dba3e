/** Opens the rows of a run: their source, shape and token cache, which is filled until the first step may begin, and their plan. */
import { rm } from "node:fs/promises";
import { within } from "../../data/cancellation.js";
import { Data, type Planned, streamOf } from "../../data/sampler/data.js";
import type { AnySource } from "../../data/sources/source.js";
import { TokenPrefetcher } from "../../data/tokens/prefetch.js";
import { notice, type TrainEvent } from "../../events.js";
import type { Native, NativeTokenCache } from "../../native.js";
import { type OpenRows, type OpenRowsInput, openRows, type RowsFromCode } from "./dataset.js";
import { openEncoder, picturesOf } from "./encoder.js";
import { cacheDir, preprocessSeconds, samplesOfStep } from "./options.js";
import { allRows, planEarly, planEncoded, planStream, wantedRows } from "./plan.js";
import { stopTokenWarning } from "./preflight.js";
import type { Resources } from "./resources.js";
import { noteEvents, openCache, prefetchFirst } from "./rows.js";
import type { Start } from "./start.js";
import { checkFreeze, type ImageMode } from "./vision.js";

export interface DataInput {
	native: Native;
	start: Start;
	code: RowsFromCode;
	signal: AbortSignal | null;
	resources: Resources;
}

/**
 * Opens the rows, and encodes them until the first step may begin. The `start` that it returns says what happens to the images of
 * the rows, which with `images auto` they decide.
 */
export async function* openData(
	input: DataInput,
): AsyncGenerator<TrainEvent, { data: Data; rows: OpenRows; start: Start }> {
	const { native, code, signal, resources } = input;
	const { resumed, vision } = input.start;
	const { args } = input.start;
	const known = resumed?.state.dataset ?? null;
	const opening = performance.now();
	const rows = yield* openReporting({ native, args, code, signal, datasetId: known, resumed });
	const openSeconds = (performance.now() - opening) / 1000;
	const { source, entryRows, hooks } = rows;
	if (rows.datasetId !== null && known === null) {
		resources.addUndo(() => rm(rows.cacheFolder, { recursive: true, force: true }));
	}
	resources.add(() => source.close());
	for (const message of rows.notices) yield notice("info", message);
	const early = planEarly(args, source, entryRows);
	const next = resumed?.state.next ?? { epoch: 0, microBatch: 0 };
	await early?.order.prepare(next.epoch);
	const wanted = early ? wantedRows(args, source, early, next) : allRows(source);
	const { textOptions } = input.start;
	const about = { native, textOptions, vision, images: args.images, source, wanted, signal };
	const opened = await openEncoder({ ...about, encoder: input.start.encoder });
	const { encoder, shape, firstRows, loader, imageHint } = opened;
	const text = encoder.info();
	const start = {
		...input.start,
		args: { ...args, images: opened.images },
		encoder,
		text,
		textOptions: opened.textOptions,
	};
	for (const message of checkFreeze(args, start.model, opened.images)) yield notice("info", message);
	yield { type: "check", name: "rows", message: rowsFound(source, shape) };
	const again = resumed && readAgain(rows, code, openSeconds);
	if (again) yield notice("info", again);
	if (rows.unverified) {
		const change = `a change of ${source.name} would go unnoticed`;
		yield notice("warning", `${cacheDir(args)} has no record of what the earlier part of this run read: ${change}`);
	}
	const images = imagesText(start, opened.images);
	if (images !== null) yield { type: "check", name: "images", message: images };
	const warning = stopTokenWarning(encoder, text.stopIds, firstRows.slice(0, 8));
	if (warning !== null) yield notice("warning", warning);

	const cache = await openCache(native, rows.cacheFolder, source, encoder, text);
	resources.add(() => cache.close());
	const seen = picturesOf(native, source, loader, rows.cacheFolder, args.follow);
	resources.add(() => seen.close());
	const { pictures } = seen;
	const prefetcher = new TokenPrefetcher({ source, cache, order: wanted, pictures, imageHint });
	resources.add(() => prefetcher.stop());
	// Waits for the recording in progress, whether the run ends well or not.
	resources.add(() => hooks?.end());
	yield* fill({ ...input, start }, prefetcher, rows);
	pictures?.lookThrough(cache, filledRows(cache));
	const planned = planEncoded(args, source, entryRows, cache, early);
	hooks?.check?.(planned.plan);
	const end = {
		samplesOfStep: samplesOfStep(args),
		once: args.follow,
		planFor: (count: number): Planned => planStream(args, count, cache),
	};
	return { data: new Data(source, shape, cache, prefetcher, planned, end, pictures), rows, start };
}

/** What happens to images, for the user; null: nothing that is worth a line. */
function imagesText({ args, vision }: Pick<Start, "args" | "vision">, mode: ImageMode): string | null {
	if (mode === "drop") return "image parts are left out of the rows (images drop)";
	if (mode !== "train" || vision === null) return null;
	const { minPixels, maxPixels } = vision.info;
	const bounds = `${minPixels.toLocaleString("en-US")} to ${maxPixels.toLocaleString("en-US")} pixels each`;
	const frozen = args.freeze.length === 0 ? "" : `; frozen: ${args.freeze.join(", ")}`;
	return `images are trained, ${bounds}${frozen}`;
}

/** The rows whose tokens are in the cache. */
function filledRows(cache: Pick<NativeTokenCache, "lengths">): Uint32Array {
	const lengths = cache.lengths();
	return Uint32Array.from(lengths.keys()).filter((row) => (lengths[row] ?? 0) > 0);
}

/** Fills the cache until the first step may begin. */
async function* fill(
	{ start: { args, resumed }, code, signal }: DataInput,
	prefetcher: TokenPrefetcher,
	{ source, hooks }: OpenRows,
): AsyncGenerator<TrainEvent, void> {
	const replayed =
		resumed && source.lazy?.inOrder
			? Math.min(prefetcher.pending, resumed.state.step * samplesOfStep(args) - (source.lazy.first ?? 0))
			: 0;
	const seconds = preprocessSeconds(args, code.dataset !== null);
	if (prefetcher.complete) yield* noteEvents(prefetcher, true);
	else yield* prefetchFirst(args, prefetcher, { replayed, seconds, hooks, signal });
	if (replayed === 0) return;
	const took = `${prefetcher.taken} rows of ${source.name} were read again in ${prefetcher.seconds.toFixed(1)} s`;
	yield notice("info", `${took} to reach the place of the checkpoint`);
}

const REPORT_MILLISECONDS = 5000;

/** Opens the rows, and reports progress where all of them must be read first and that takes long. */
async function* openReporting(input: OpenRowsInput): AsyncGenerator<TrainEvent, OpenRows> {
	let rows = 0;
	const opening = openRows({ ...input, progress: (read) => (rows = read) });
	let opened: OpenRows | undefined;
	try {
		while (opened === undefined) {
			opened = await within(opening, REPORT_MILLISECONDS);
			if (opened !== undefined || rows === 0) continue;
			yield notice("info", `${rows} rows from code are read so far; all of them must be known before the first step`);
		}
		return opened;
	} finally {
		// A reader who has left meanwhile closes nothing.
		if (opened === undefined) opening.then(({ source }) => source.close()).catch(() => {});
	}
}

/** What resuming costs with a user-supplied data set. Null: nothing, or it is reported once it is known. */
function readAgain({ source, datasetId }: OpenRows, code: RowsFromCode, seconds: number): string | null {
	if (datasetId !== null) {
		if (source.lazy?.inOrder) return null;
		return `the rows of ${source.name} that are still to be trained are read again and compared; a data set with an identity needs no comparison`;
	}
	if (code.convert === null && (code.dataset === null || "get" in code.dataset)) return null;
	return `${source.length} rows of ${source.name} were read again in ${seconds.toFixed(1)} s`;
}

function rowsFound(source: AnySource, shape: string): string {
	const blank = source.blankLines > 0 ? `, ${source.blankLines} blank lines passed over` : "";
	const left = source.leftOut ? `, ${source.leftOut} left out by the converting function` : "";
	const many = streamOf(source) ? `as many rows as come (${source.length} at most)` : `${source.length} rows`;
	return `${many} of ${shape} in ${source.name}${blank}${left}`;
}
