/** `arl images`: rows with the images in them that they name by URL, so that nothing has to be fetched where they are used. */
import { open } from "node:fs/promises";
import { Option } from "commander";
import { openFiles } from "../data/sources/open.js";
import { maxRowBytes, rowTooLarge } from "../data/sources/row-size.js";
import type { Source } from "../data/sources/source.js";
import { type BadRow, badRowsError, countReasons } from "../data/tokens/problems.js";
import { writeWhole } from "../disk/write-whole.js";
import { EXIT_CODES, messageOf, toArlError } from "../errors.js";
import { imagesToBase64InText } from "../images/embed.js";
import { ImageLoader } from "../images/loader.js";
import { loadNative } from "../native.js";
import { jsonLine, rowsText } from "../report/format.js";
import { type ImageFlags, withImageOptions } from "./image-options.js";
import { columns, command, parse } from "./options.js";
import { onStopSignals } from "./signals.js";

interface Options extends ImageFlags {
	train_file: string[];
	out: string;
	columns?: string[];
	on_bad_row: "error" | "skip";
	json?: boolean;
}

function definition() {
	return withImageOptions(
		command("images", "Writes rows with their images in them: each image_url becomes a base64 data URL.")
			.requiredOption("--train_file <file...>", "files or globs of rows")
			.requiredOption("--out <file>", "the JSONL file to write")
			.addOption(
				new Option("--on_bad_row <how>", "error: write nothing if an image cannot be had; skip: leave such rows out")
					.choices(["error", "skip"])
					.default("error"),
			)
			.option("--columns <name=column...>", "names of columns that differ from the known ones"),
	).option("--json", "the outcome as one JSON value");
}

/** Rows that are worked on at once; the loader bounds the images among them. */
const ROWS_AHEAD = 32;

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

/** A row of a JSON file may stand on several lines; line ends are white space there, and nowhere else in JSON. */
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
	const options = parse<Options>(definition(), words);
	if (options === null) return 0;
	const names = columns(options.columns);
	const stop = onStopSignals(() => process.stderr.write("stopping\n"));
	const { source, notices } = await openFiles(loadNative(), options.train_file, { columns: names });
	for (const notice of notices) process.stderr.write(`${notice}\n`);
	const loader = new ImageLoader({ ...options, signal: stop.signal });
	const result = { rows: 0, images: 0, bad: [] as BadRow[] };
	try {
		await writeWhole(options.out, async (partial) => {
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
			if (result.bad.length > 0 && options.on_bad_row === "error") throw badRowsError(result.bad, source.length);
		});
		report(options, result);
		return 0;
	} catch (error) {
		if (stop.signal.aborted) return EXIT_CODES.ARL_INTERRUPTED;
		throw error;
	} finally {
		await loader.close();
		await source.close();
		stop.release();
	}
}

/** Results by number, while those that follow are on their way. */
async function* inOrder<T>(count: number, work: (index: number) => Promise<T>): AsyncGenerator<T> {
	const ahead: Promise<T>[] = [];
	for (let next = 0; next < count || ahead.length > 0; ) {
		while (next < count && ahead.length < ROWS_AHEAD) {
			const promise = work(next++);
			// A failure is thrown where its turn comes; until then it must not count as unhandled.
			promise.catch(() => {});
			ahead.push(promise);
		}
		const first = ahead.shift();
		if (first) yield await first;
	}
}

function report(options: Options, { rows, images, bad }: { rows: number; images: number; bad: BadRow[] }): void {
	if (options.json) {
		const skipped = bad.map(({ location, reason, message }) => ({ location, reason, message }));
		process.stdout.write(`${jsonLine({ type: "images", out: options.out, rows, images, skipped })}\n`);
		return;
	}
	process.stderr.write(
		`wrote ${rowsText(rows)} with ${images === 1 ? "1 image" : `${images} images`} to ${options.out}\n`,
	);
	if (bad.length === 0) return;
	const reasons = Object.entries(countReasons(bad)).map(([reason, count]) => `${reason}: ${count}`);
	process.stderr.write(`left out ${rowsText(bad.length)} (${reasons.join(", ")})\n`);
	for (const { location, message } of bad) process.stderr.write(`  ${location}: ${message}\n`);
}
