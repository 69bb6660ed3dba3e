/** `arl images`: replaces the image URLs of rows by the images, so that no later reader has to fetch them. */
import { open } from "node:fs/promises";
import { described, integerOrNone, required, requiredString, trainingSchema } from "../config/index.js";
import { openFiles } from "../data/sources/open.js";
import { maxRowBytes, rowTooLarge } from "../data/sources/row-size.js";
import type { Source } from "../data/sources/source.js";
import { type BadRow, badRowsError, countReasons } from "../data/tokens/problems.js";
import { writeWhole } from "../disk/write-whole.js";
import { messageOf, toArlError } from "../errors.js";
import { rowFiles } from "../hub/index.js";
import { imagesToBase64InText } from "../images/embed.js";
import { ImageLoader } from "../images/loader.js";
import { loadNative } from "../native.js";
import { jsonLine, rowsText } from "../report/format.js";
import { liveLine } from "../report/live.js";
import { JSON_FLAG, parseCommand } from "./command.js";
import { fetchingOn } from "./fetching.js";
import { stoppable } from "./signals.js";

const { train_file, on_bad_row, columns } = trainingSchema.shape;
const { image_root, image_allow_private, image_max_bytes, image_timeout, image_cache_dir } = trainingSchema.shape;

export const COMMAND = {
	name: "arl images",
	usage: "--train_file FILE... --out FILE [--OPTION VALUE ...]",
	about: "Writes rows with their images in them: each image_url becomes a base64 data URL.",
	flags: {
		train_file: required(train_file, "Files of rows."),
		out: requiredString({ expects: "a file", literal: true, description: "The JSONL file to write." }),
		on_bad_row: described(
			on_bad_row,
			"error: write nothing if an image cannot be read; skip: leave rows with such images out.",
		),
		columns,
		image_root: described(image_root, "Folder below which file: URLs are read; none: they are refused."),
		image_allow_private: described(image_allow_private, "Read images from this machine and from private networks too."),
		image_max_bytes: described(image_max_bytes, "Largest image in bytes."),
		image_timeout,
		image_cache_dir: described(
			image_cache_dir,
			"Folder that keeps fetched images, up to 10 GiB; none: they are not kept.",
		),
		max_pixels: integerOrNone({
			min: 1,
			description: "Scale larger images down to this many pixels, which needs the package sharp; none: keep them.",
		}),
		json: JSON_FLAG,
	},
};

/** Rows in progress at once; the loader bounds their images. */
const ROWS_AHEAD = 32;

interface Result {
	out: string;
	rows: number;
	images: number;
	bad: BadRow[];
}

interface Done {
	text: Uint8Array;
	images: number;
}

/** One row, or why it cannot be used. */
async function embed(
	source: Source,
	row: number,
	loader: ImageLoader,
	names: Readonly<Record<string, string>>,
): Promise<Done | BadRow> {
	const bad = (reason: string, message: string): BadRow => ({ row, location: source.location(row), reason, message });
	const tooLarge = (size: number): BadRow => ({ row, location: source.location(row), ...rowTooLarge(size) });
	if (source.bytes(row) > maxRowBytes()) return tooLarge(source.bytes(row));
	const [text = new Uint8Array()] = await source.read([row]);
	try {
		JSON.parse(Buffer.from(text).toString());
	} catch (error) {
		return bad("not json", messageOf(error));
	}
	try {
		const { row: embedded, images } = await imagesToBase64InText(text, loader, names);
		if (embedded.length > maxRowBytes()) return tooLarge(embedded.length);
		return { text: embedded, images };
	} catch (error) {
		const { code, message, hint } = toArlError(error);
		if (code === "ARL_DATA") return { ...bad("missing image", message), hint };
		throw error;
	}
}

/** A row as one line: in a JSON file it may span several, whose ends are white space, since JSON strings have none. */
function asLine(text: Uint8Array): Buffer {
	const line = Buffer.alloc(text.length + 1, "\n");
	for (let at = 0; at < text.length; at++) {
		const byte = text[at] as number;
		line[at] = byte === 0x0a || byte === 0x0d ? 0x20 : byte;
	}
	return line;
}

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[]): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const { train_file: entries, out, on_bad_row: onBadRow, columns: names, json, ...options } = given.flags;
	return stoppable(async (signal) => {
		const live = liveLine(process.stderr);
		const files = await rowFiles(entries, { signal, progress: fetchingOn(live) }).finally(() => live?.clear());
		const { source, notices } = await openFiles(loadNative(), files.entries, { columns: names });
		for (const notice of [...files.notices, ...notices]) process.stderr.write(`${notice}\n`);
		const loader = new ImageLoader({ ...options, signal });
		const result: Result = { out, rows: 0, images: 0, bad: [] };
		try {
			await writeWhole(out, async (partial) => {
				const file = await open(partial, "w");
				try {
					for await (const done of inOrder(source.length, (row) => embed(source, row, loader, names))) {
						if ("reason" in done) result.bad.push(done);
						else {
							result.rows += 1;
							result.images += done.images;
							await file.appendFile(asLine(done.text));
						}
					}
				} finally {
					await file.close();
				}
				if (result.bad.length > 0 && onBadRow === "error") throw badRowsError(result.bad, source.length);
			});
			report(result, json);
			return 0;
		} finally {
			await loader.close();
			await source.close();
		}
	});
}

/** Results in order, while later ones are already in progress. */
async function* inOrder<T>(count: number, work: (index: number) => Promise<T>): AsyncGenerator<T> {
	const ahead: Promise<T>[] = [];
	for (let next = 0; next < count || ahead.length > 0; ) {
		while (next < count && ahead.length < ROWS_AHEAD) {
			const promise = work(next++);
			// A failure is thrown in its turn; until then Node must not see an unhandled rejection.
			promise.catch(() => {});
			ahead.push(promise);
		}
		const first = ahead.shift();
		if (first) yield await first;
	}
}

function report({ out, rows, images, bad }: Result, json: boolean): void {
	if (json) {
		const skipped = bad.map(({ location, reason, message }) => ({ location, reason, message }));
		process.stdout.write(`${jsonLine({ type: "images", out, rows, images, skipped })}\n`);
		return;
	}
	process.stderr.write(`wrote ${rowsText(rows)} with ${images === 1 ? "1 image" : `${images} images`} to ${out}\n`);
	if (bad.length === 0) return;
	const reasons = Object.entries(countReasons(bad)).map(([reason, count]) => `${reason}: ${count}`);
	process.stderr.write(`left out ${rowsText(bad.length)} (${reasons.join(", ")})\n`);
	for (const { location, message } of bad) process.stderr.write(`  ${location}: ${message}\n`);
}
