/**
 * Determines a file's format by its first bytes. The name decides only where the content cannot: a table of plain text, a
 * single object.
 */
import { open } from "node:fs/promises";
import { extname } from "node:path";
import { ArlError, toArlError } from "../../errors.js";
import type { Native } from "../../native.js";
import { HEADER_NAMES } from "./columns.js";

/** A file's format according to its first bytes. */
export type FileKind = "gzip" | "zstd" | "parquet" | "csv" | "array" | "object" | "other";

const FIRST_BYTES = 64 * 1024;

/** Unsupported formats by their first bytes, with what to do. */
const REFUSED: readonly { start: string; at?: number; what: string; hint: string }[] = [
	{ start: "PARE", what: "the Parquet file is encrypted", hint: "Write it without encryption." },
	{
		start: "ARROW1",
		what: "an Arrow file, which is not supported",
		hint: "Write the rows as Parquet or JSONL, for example `dataset.to_parquet(...)`.",
	},
	{ start: "PK\x03\x04", what: "a zip archive, which is not supported", hint: "Unpack it." },
	{
		start: "BZh",
		what: "a bzip2 file, which is not supported",
		hint: "Unpack it, or compress it with gzip or zstd.",
	},
	{
		start: "\xfd7zXZ\x00",
		what: "an xz file, which is not supported",
		hint: "Unpack it, or compress it with gzip or zstd.",
	},
	{
		start: "\x04\x22\x4d\x18",
		what: "an lz4 file, which is not supported",
		hint: "Unpack it, or compress it with gzip or zstd.",
	},
	{ start: "7z\xbc\xaf\x27\x1c", what: "a 7z archive, which is not supported", hint: "Unpack it." },
	{
		start: "ustar",
		at: 257,
		what: "a tar archive, which is not supported",
		hint: "Unpack it, and name the files in it.",
	},
	{ start: "SQLite format 3", what: "an SQLite database, which is not supported", hint: "Write the rows as JSONL." },
	{ start: "Obj\x01", what: "an Avro file, which is not supported", hint: "Write the rows as Parquet or JSONL." },
	{
		start: "\x80\x04\x95",
		what: "a Python pickle, which is not supported",
		hint: "Write the rows as JSONL, with json.dumps for each.",
	},
	{
		start: "version https://git-lfs",
		what: "a pointer of Git LFS in place of the file",
		hint: "Fetch the file itself: git lfs pull",
	},
];

/** Extensions of workbooks, which are zip archives. */
const WORKBOOK = /\.(xlsx|xlsm|ods)$/i;

/** What sniffing needs from the core. */
export type SniffNative = Pick<Native, "sniff">;

/**
 * Determines a file's format by its content. `name`: the path that the user gave. Throws `ARL_DATA` for files that contain no
 * rows: empty, UTF-16 or UTF-32, an archive, plain text.
 */
export async function sniff(native: SniffNative, path: string, name = path): Promise<FileKind> {
	const handle = await open(path, "r").catch((error: unknown) => {
		throw toArlError(error);
	});
	try {
		const { buffer, bytesRead } = await handle.read(Buffer.alloc(FIRST_BYTES), 0, FIRST_BYTES, 0);
		const head = buffer.subarray(0, bytesRead);
		if (bytesRead === 0)
			throw new ArlError("ARL_DATA", `${name}: the file is empty`, "Each line should be a JSON object.");
		const content = native.sniff(head);
		if (content === "gzip" || content === "zstd") return content;
		if (head.toString("latin1", 0, 4) === "PAR1") return "parquet";
		checkKnown(name, head);
		if (content !== "other") throw otherEncoding(name, content);
		return textKind(name, head.subarray(head.subarray(0, 3).equals(BOM) ? 3 : 0));
	} finally {
		await handle.close();
	}
}

/** Throws for an unsupported format. */
function checkKnown(name: string, head: Buffer): void {
	const refused = REFUSED.find(({ start, at = 0 }) => head.toString("latin1", at, at + start.length) === start);
	if (refused === undefined) return;
	if (refused.start.startsWith("PK") && WORKBOOK.test(name)) {
		throw new ArlError("ARL_DATA", `${name}: a workbook, which is not supported`, "Save the sheet as CSV (UTF-8).");
	}
	throw new ArlError("ARL_DATA", `${name}: ${refused.what}`, refused.hint);
}

/** A name's extension, without that of compression. */
function ending(name: string): string {
	return extname(name.replace(/\.(gz|zst|zstd)$/i, "")).toLowerCase();
}

/** Extensions of JSON lines; in other files, text that does not begin with an object is something else. */
const JSON_LINES = /^\.(jsonl|ndjson|json|)$/;

function textKind(name: string, text: Buffer): FileKind {
	const first = text.find((byte) => byte !== 0x20 && byte !== 0x0a && byte !== 0x0d && byte !== 0x09);
	if (first === 0x5b) return "array";
	const end = ending(name);
	if (first === 0x7b) return end === ".json" ? "object" : "other";
	if (end === ".csv" || end === ".tsv" || isHeader(text)) return "csv";
	if (end === ".parquet") {
		throw new ArlError(
			"ARL_DATA",
			`${name}: not a Parquet file: it does not begin with PAR1`,
			"The file is damaged, or something else under the name of Parquet.",
		);
	}
	if (/^\s*<(!doctype html|html|\?xml)/i.test(text.toString("latin1", 0, 64))) {
		throw new ArlError(
			"ARL_DATA",
			`${name}:1: a page of HTML or XML, not rows`,
			"The download returned a page instead of the file: fetch the file itself.",
		);
	}
	if (first !== undefined && !JSON_LINES.test(end)) throw plainText(name);
	return "other";
}

function plainText(name: string): ArlError {
	return new ArlError(
		"ARL_DATA",
		`${name}:1: plain text, not rows: rows are JSON objects, one per line`,
		'Write each text as a row, {"text": "..."}, or a conversation as {"messages": [...]}, into a file that ends in .jsonl. With Python: json.dumps({"text": text})',
	);
}

/** Whether the first line is a table's header with columns of rows. */
function isHeader(text: Buffer): boolean {
	const [line = ""] = text.toString("utf8").split(/\r?\n/, 1);
	const names = line.split(/[,;\t]/).map((name) => name.trim().replace(/^"(.*)"$/, "$1"));
	return names.length > 0 && names.some((name) => HEADER_NAMES.has(name));
}

/** UTF-8's byte order mark; skipped at the beginning of a file. */
export const BOM = Buffer.from([0xef, 0xbb, 0xbf]);

function otherEncoding(name: string, encoding: "UTF-16" | "UTF-32"): ArlError {
	return new ArlError(
		"ARL_DATA",
		`${name}:1: the file is not UTF-8 (it looks like ${encoding})`,
		`Convert it: iconv -f ${encoding} -t UTF-8 ${name} > rows.jsonl`,
	);
}
