/**
 * A CSV or TSV file as rows: the header names the keys, fields are texts, and the columns of lists and objects hold their
 * JSON. Rows are written once into a spool file; from then on they are like the lines of a JSONL file.
 */
import { createReadStream } from "node:fs";
import { type CsvError, type Info, parse } from "csv-parse";
import { ArlError, toArlError } from "../errors.js";
import { type ColumnNames, holdsNested, holdsNumber, writeNested } from "./columns.js";
import { type JsonBytes, keyBytes } from "./json-bytes.js";
import { isBlankText } from "./json-scan.js";
import type { FileRows } from "./jsonl.js";
import { BOM } from "./sniff.js";
import { RowSpool } from "./spool.js";

export interface CsvOptions {
	spoolDir: string;
	name: string;
	columns: ColumnNames;
}

const READ_BYTES = 1024 * 1024;
const HINT = "Quote fields that hold the separator, quotes or line breaks, and double the quotes in them.";

/** The separator that the header has most of; the comma where it has none. */
function separatorOf(head: Buffer): string {
	const [line = ""] = head.toString("utf8").split(/\r?\n/, 1);
	const outside = line.replace(/"[^"]*"/g, "");
	const counts = [",", "\t", ";"].map((separator) => ({ separator, count: outside.split(separator).length }));
	return counts.reduce((best, next) => (next.count > best.count ? next : best)).separator;
}

/** How a column's fields are written. */
type WriteField = (out: JsonBytes, field: Buffer) => void;

const JSON_NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;

function fieldWriter(column: string, names: ColumnNames): WriteField {
	if (holdsNested(column, names)) return writeNested;
	if (!holdsNumber(column, names)) return (out, field) => out.string(field);
	return (out, field) => {
		const text = field.toString("latin1").trim();
		if (JSON_NUMBER.test(text)) out.ascii(text);
		else if (isBlankText(field)) out.null();
		else out.string(field);
	};
}

function headerColumns(fields: Buffer[], options: CsvOptions): { key: Buffer; write: WriteField }[] {
	const names = fields.map((field) => field.toString("utf8").trim());
	for (const [i, name] of names.entries()) {
		const wrong =
			name === "" ? `column ${i + 1} has no name` : names.indexOf(name) < i ? `two columns are ${name}` : "";
		if (wrong !== "") {
			throw new ArlError(
				"ARL_DATA",
				`${options.name}:1: the header: ${wrong}`,
				"The first line should name the columns.",
			);
		}
	}
	return names.map((name) => ({ key: keyBytes(name), write: fieldWriter(name, options.columns) }));
}

/** The errors of the parser by what they mean; each has its line. */
function csvError(error: unknown, name: string): ArlError {
	if (!(error instanceof Error) || !("code" in error) || !String(error.code).startsWith("CSV_"))
		return toArlError(error);
	const { lines, message } = error as CsvError & { lines?: number };
	return new ArlError("ARL_DATA", `${name}:${lines ?? 1}: ${message}`, HINT, { cause: error });
}

interface Parsed {
	record: Buffer[];
	info: Info;
}

async function* records(path: string): AsyncGenerator<Parsed> {
	const stream = createReadStream(path, { highWaterMark: READ_BYTES });
	const chunks = stream[Symbol.asyncIterator]();
	try {
		const first = await chunks.next();
		const head: Buffer = first.done ? Buffer.alloc(0) : first.value;
		const text = head.subarray(head.subarray(0, 3).equals(BOM) ? 3 : 0);
		const parser = parse({
			// Fields stay bytes: text that is no UTF-8 must be found, and not become replacement characters.
			encoding: null,
			delimiter: separatorOf(text),
			info: true,
			relax_column_count: true,
			skip_empty_lines: true,
		});
		const feed = (async () => {
			for (let chunk = text; ; ) {
				if (!parser.write(chunk)) await new Promise<void>((resolve) => parser.once("drain", resolve));
				const next = await chunks.next();
				if (next.done) break;
				chunk = next.value;
			}
			parser.end();
		})();
		feed.catch((error: unknown) => parser.destroy(error instanceof Error ? error : new Error(String(error))));
		for await (const parsed of parser) yield parsed as Parsed;
		await feed;
	} finally {
		stream.destroy();
	}
}

/** Opens a CSV file. Throws `ARL_DATA` with the line for what is no table. */
export async function openCsv(path: string, options: CsvOptions): Promise<FileRows> {
	const { name, spoolDir } = options;
	const locate = (_: number, line: number) => `${name}:${line}`;
	return RowSpool.fill({ spoolDir, name, numbered: true, locate }, async (spool) => {
		let columns: { key: Buffer; write: WriteField }[] | null = null;
		let blankLines = 0;
		let line = 1;
		try {
			for await (const { record, info } of records(path)) {
				// The parser counts the empty lines before a record, and says where the record ends.
				const start = line + (info.empty_lines - blankLines);
				blankLines = info.empty_lines;
				line = info.lines + 1;
				if (columns === null) {
					columns = headerColumns(record, options);
					continue;
				}
				if (record.length !== columns.length) {
					const what = `${record.length} fields where the header has ${columns.length}`;
					throw new ArlError("ARL_DATA", `${name}:${start}: ${what}`, HINT);
				}
				for (const [i, { key, write }] of columns.entries()) {
					spool.out.byte(i === 0 ? 0x7b : 0x2c);
					spool.out.raw(key);
					write(spool.out, record[i] as Buffer);
				}
				spool.out.byte(0x7d);
				if (spool.endRow(start)) await spool.flush();
			}
		} catch (error) {
			throw csvError(error, name);
		}
		if (spool.rows === 0) {
			throw new ArlError(
				"ARL_DATA",
				`${name}:1: the file has a header and no rows`,
				"Each line below the header is a row.",
			);
		}
		return { blankLines };
	});
}
