/**
 * What a file is, by its first bytes. Its name decides only where content cannot: a table of plain text, a single object.
 */
import { open } from "node:fs/promises";
import { extname } from "node:path";
import { ArlError, toArlError } from "../errors.js";
import { HEADER_NAMES } from "./columns.js";

/** What a file's first bytes say that it is. */
export type FileKind = "gzip" | "zstd" | "parquet" | "csv" | "array" | "object" | "other";

const FIRST_BYTES = 64 * 1024;

/** Kinds of files that are known and not read, by their first bytes, with what to do. */
const REFUSED: readonly [start: string, what: string, hint: string][] = [
	["PARE", "the Parquet file is encrypted", "Write it without encryption."],
	[
		"ARROW1",
		"an Arrow file, which is not read",
		"Write the rows as Parquet or JSONL, for example `dataset.to_parquet(...)`.",
	],
	["PK\x03\x04", "a zip archive, which is not read", "Unpack it."],
	["BZh", "a bzip2 file, which is not read", "Unpack it, or compress it with gzip or zstd."],
	["\xfd7zXZ\x00", "an xz file, which is not read", "Unpack it, or compress it with gzip or zstd."],
	["SQLite format 3", "an SQLite database, which is not read", "Write the rows as JSONL."],
	["Obj\x01", "an Avro file, which is not read", "Write the rows as Parquet or JSONL."],
	["version https://git-lfs", "a pointer of Git LFS in place of the file", "Fetch the file itself: git lfs pull"],
];

/**
 * Tells the kind of a file by its content. `name`: what its user knows it by. Throws `ARL_DATA` for what is no file of rows:
 * empty, UTF-16 or UTF-32, an archive.
 */
export async function sniff(path: string, name = path): Promise<FileKind> {
	const handle = await open(path, "r").catch((error: unknown) => {
		throw toArlError(error);
	});
	try {
		const { buffer, bytesRead } = await handle.read(Buffer.alloc(FIRST_BYTES), 0, FIRST_BYTES, 0);
		const head = buffer.subarray(0, bytesRead);
		if (bytesRead === 0)
			throw new ArlError("ARL_DATA", `${name}: the file is empty`, "Each line should be a JSON object.");
		if (head[0] === 0x1f && head[1] === 0x8b) return "gzip";
		if (head.length >= 4 && head.readUInt32LE(0) === 0xfd2fb528) return "zstd";
		if (head.toString("latin1", 0, 4) === "PAR1") return "parquet";
		const refused = REFUSED.find(([start]) => head.toString("latin1", 0, start.length) === start);
		if (refused) throw new ArlError("ARL_DATA", `${name}: ${refused[1]}`, refused[2]);
		checkEncoding(name, head);
		return textKind(name, head.subarray(head.subarray(0, 3).equals(BOM) ? 3 : 0));
	} finally {
		await handle.close();
	}
}

/** The ending of a name, without that of a compressed file. */
function ending(name: string): string {
	return extname(name.replace(/\.(gz|zst|zstd)$/i, "")).toLowerCase();
}

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
			"The file is damaged, or something else by the name of Parquet.",
		);
	}
	return "other";
}

/** Whether the first line names columns of rows, as that of a table does. */
function isHeader(text: Buffer): boolean {
	const [line = ""] = text.toString("utf8").split(/\r?\n/, 1);
	const names = line.split(/[,;\t]/).map((name) => name.trim().replace(/^"(.*)"$/, "$1"));
	return names.length > 0 && names.some((name) => HEADER_NAMES.has(name));
}

/** UTF-8's byte order mark; skipped where it opens a file. */
export const BOM = Buffer.from([0xef, 0xbb, 0xbf]);

function checkEncoding(path: string, head: Buffer): void {
	const little = head[0] === 0xff && head[1] === 0xfe;
	const big = head[0] === 0xfe && head[1] === 0xff;
	// JSON text in ASCII range has a zero in every second byte in UTF-16; UTF-8 text has none at all.
	const zeros = head.subarray(0, 64).filter((byte) => byte === 0).length;
	if (!little && !big && zeros < 8) return;
	const name = little || big || zeros <= 40 ? "UTF-16" : "UTF-32";
	throw new ArlError(
		"ARL_DATA",
		`${path}:1: the file is not UTF-8 (it looks like ${name})`,
		`Convert it: iconv -f ${name} -t UTF-8 ${path} > rows.jsonl`,
	);
}
