/**
 * Reads a CSV or TSV file: the header names the keys, fields are strings, and the columns of lists and objects contain JSON.
 * Rows are written once into a spill file as JSON lines, and read from it afterwards.
 */
import { createReadStream } from "node:fs";
import { CsvError, type Info, parse } from "csv-parse";
import { ArlError, toArlError } from "../../errors.js";
import { type ColumnNames, holdsNested, holdsNumber, writeNested } from "./columns.js";
import { type JsonBytes, keyBytes } from "./json-bytes.js";
import { isBlankText } from "./json-scan.js";
import type { FileRows } from "./jsonl.js";
import { maxRowBytes } from "./row-size.js";
import type { Scratch } from "./scratch.js";
import { BOM } from "./sniff.js";
import { SpillFile } from "./spill-file.js";

export interface CsvOptions {
	scratch: Scratch;
	name: string;
	columns: ColumnNames;
	signal: AbortSignal | null;
	/** Collects what a user should know about how the file is read. */
	notices: string[];
}

const READ_BYTES = 1024 * 1024;
const HINT = "Quote fields that hold the separator, quotes or line breaks, and double the quotes in them.";

/** The most frequent separator in the header; the comma if it has none. */
function separatorOf(head: Buffer): string {
	const [line = ""] = head.toString("utf8").split(/\r?\n/, 1);
	const outside = line.replace(/"[^"]*"/g, "");
	const counts = [",", "\t", ";"].map((separator) => ({ separator, count: outside.split(separator).length }));
	return counts.reduce((best, next) => (next.count > best.count ? next : best)).separator;
}

/** Writes a field of a column. */
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

/** A column of the table; one without a name is not in the rows. */
interface Column {
	key: Buffer;
	write: WriteField;
	/** What the fields of a column without a name may be: an index or nothing, neither of which belongs to the row. */
	unnamed: "index" | "empty" | null;
}

const UNNAMED_HINT =
	"The first line should name the columns. An index is not written with to_csv(path, index=False) in pandas, and write.csv(rows, row.names = FALSE) in R.";

function headerColumns(fields: Buffer[], line: number, options: CsvOptions): Column[] {
	const names = fields.map((field) => field.toString("utf8").trim());
	if (names.every((name) => name === "")) {
		throw new ArlError("ARL_DATA", `${options.name}:${line}: the header names no column`, UNNAMED_HINT);
	}
	const twice = names.find((name, i) => name !== "" && names.indexOf(name) < i);
	if (twice !== undefined) {
		throw new ArlError(
			"ARL_DATA",
			`${options.name}:${line}: the header: two columns are named ${twice}`,
			"Give each column its own name.",
		);
	}
	return names.map((name, i) => ({
		key: keyBytes(name),
		write: fieldWriter(name, options.columns),
		unnamed: name !== "" ? null : i === 0 ? "index" : "empty",
	}));
}

/** Throws if a field of a column without a name contains data. */
function checkUnnamed(field: Buffer, column: number, kind: "index" | "empty", header: string, line: number): void {
	const text = field.toString("utf8").trim();
	if (text === "" || (kind === "index" && /^-?\d+$/.test(text))) return;
	throw new ArlError(
		"ARL_DATA",
		`${header}: the header: column ${column} has no name, and contains ${JSON.stringify(text.slice(0, 40))} on line ${line}`,
		UNNAMED_HINT,
	);
}

/** Notices about columns that are left out. */
function leftOut(columns: readonly Column[], name: string): string[] {
	return columns.flatMap(({ unnamed }, i) => {
		if (unnamed === null) return [];
		if (unnamed === "empty") return [`${name}: column ${i + 1} has no name and is empty; it is left out`];
		return [
			`${name}: column 1 has no name and contains numbers, like the index that pandas writes; it is left out (to_csv(path, index=False) writes none)`,
		];
	});
}

/** The parser's errors in plain words. */
const REFUSED: Readonly<Record<string, string>> = {
	CSV_QUOTE_NOT_CLOSED: "a quoted field has no end",
	INVALID_OPENING_QUOTE: "a quote inside a field that is not quoted",
	CSV_INVALID_CLOSING_QUOTE: "something follows the closing quote of a field",
	CSV_MAX_RECORD_SIZE: "a row of many megabytes; has a quoted field no end?",
};

/** Counts lines up to a byte offset: the parser's own count takes `\r\n` inside quotes for two. */
class Lines {
	private readonly chunks: Buffer[] = [];
	/** The offset of the first chunk. */
	private start = 0;
	private at = 0;
	line = 1;

	push(chunk: Buffer): void {
		this.chunks.push(chunk);
	}

	private next(): number | undefined {
		let chunk = this.chunks[0];
		while (chunk !== undefined && this.at - this.start >= chunk.length) {
			this.start += chunk.length;
			this.chunks.shift();
			chunk = this.chunks[0];
		}
		return chunk?.[this.at - this.start];
	}

	private step(byte: number): void {
		this.at += 1;
		// A carriage return ends a line only where no line feed follows.
		if (byte === 10 || (byte === 13 && this.next() !== 10)) this.line += 1;
	}

	/** Advances to an offset. */
	moveTo(offset: number): void {
		for (let byte = this.next(); byte !== undefined && this.at < offset; byte = this.next()) this.step(byte);
	}

	/** Skips empty lines; returns the number of the line that follows. */
	skipEmpty(): number {
		for (let byte = this.next(); byte === 10 || byte === 13; byte = this.next()) this.step(byte);
		return this.line;
	}
}

interface Parsed {
	record: Buffer[];
	info: Info;
}

async function* records(path: string, lines: Lines): AsyncGenerator<Parsed> {
	const stream = createReadStream(path, { highWaterMark: READ_BYTES });
	const chunks = stream[Symbol.asyncIterator]();
	try {
		const first = await chunks.next();
		const head: Buffer = first.done ? Buffer.alloc(0) : first.value;
		const text = head.subarray(head.subarray(0, 3).equals(BOM) ? 3 : 0);
		const parser = parse({
			// Fields stay bytes: invalid UTF-8 must be reported, and not become replacement characters.
			encoding: null,
			delimiter: separatorOf(text),
			info: true,
			relax_column_count: true,
			skip_empty_lines: true,
			// Rows that are too large are refused later; this ends the search for a missing closing quote.
			max_record_size: 2 * maxRowBytes(),
		});
		const feed = (async () => {
			for (let chunk = text; ; ) {
				lines.push(chunk);
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

/** Opens a CSV file. Throws `ARL_DATA` with the line if it is not a table. */
export async function openCsv(path: string, options: CsvOptions): Promise<FileRows> {
	const { name, scratch, signal, notices } = options;
	const locate = (_: number, line: number) => `${name}:${line}`;
	return SpillFile.fill({ scratch, name, numbered: true, locate, signal }, async (spill) => {
		let columns: Column[] | null = null;
		let header = name;
		let blankLines = 0;
		const lines = new Lines();
		try {
			for await (const { record, info } of records(path, lines)) {
				const line = lines.skipEmpty();
				lines.moveTo(info.bytes);
				blankLines = info.empty_lines;
				if (columns === null) {
					columns = headerColumns(record, line, options);
					header = `${name}:${line}`;
					continue;
				}
				if (record.length !== columns.length) {
					const what = `${record.length} fields where the header has ${columns.length}`;
					throw new ArlError("ARL_DATA", `${name}:${line}: ${what}`, HINT);
				}
				let separator = 0x7b;
				for (const [i, { key, write, unnamed }] of columns.entries()) {
					if (unnamed !== null) {
						checkUnnamed(record[i] as Buffer, i + 1, unnamed, header, line);
						continue;
					}
					spill.out.byte(separator);
					separator = 0x2c;
					spill.out.raw(key);
					write(spill.out, record[i] as Buffer);
				}
				spill.out.byte(0x7d);
				if (spill.endRow(line)) await spill.flush();
			}
		} catch (error) {
			if (!(error instanceof CsvError)) throw toArlError(error);
			lines.moveTo(Number(Reflect.get(error, "bytes") ?? 0));
			const what = REFUSED[error.code] ?? error.message;
			throw new ArlError("ARL_DATA", `${name}:${lines.skipEmpty()}: ${what}`, HINT, { cause: error });
		}
		if (spill.rows === 0) {
			throw new ArlError(
				"ARL_DATA",
				`${name}:1: the file has a header and no rows`,
				"Each line below the header is a row.",
			);
		}
		notices.push(...leftOut(columns ?? [], name));
		return { blankLines };
	});
}
