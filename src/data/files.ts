/**
 * From what a user names (files, globs) to the files that will be read, and what is wrong with a name that cannot be.
 * Looks at names, kinds and first bytes only; rows are the business of the readers.
 */
import { open, readdir, stat } from "node:fs/promises";
import { basename, dirname, extname, join } from "node:path";
import { ArlError, toArlError } from "../errors.js";
import { glob, isGlob } from "./glob.js";

/** Levenshtein distance, for near names. */
function distance(a: string, b: string): number {
	let row = Array.from({ length: b.length + 1 }, (_, i) => i);
	for (let i = 1; i <= a.length; i++) {
		const next = [i];
		for (let j = 1; j <= b.length; j++) {
			const change = (row[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1);
			next.push(Math.min(change, (row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1));
		}
		row = next;
	}
	return row[b.length] ?? 0;
}

/** Names in the same folder that a typing error away, or the folder above that is missing itself. */
async function nearNames(path: string): Promise<string> {
	const folder = dirname(path);
	const name = basename(path);
	const entries = await readdir(folder).catch(() => null);
	if (entries === null)
		return `The folder ${folder} does not exist either; relative paths start at the working directory.`;
	const near = entries
		.map((entry) => ({ entry, far: distance(entry.toLowerCase(), name.toLowerCase()) }))
		.filter(({ far }) => far <= Math.max(2, Math.floor(name.length / 3)))
		.sort((a, b) => a.far - b.far)
		.slice(0, 3)
		.map(({ entry }) => join(folder, entry));
	if (near.length > 0) return `Did you mean ${near.join(" or ")}?`;
	return "Check the path; relative paths start at the working directory.";
}

/** The files that one entry of `train_file` names, in the order in which they are read. Throws `ARL_DATA`. */
export async function resolveFiles(entry: string): Promise<string[]> {
	const info = await stat(entry).catch((error: NodeJS.ErrnoException) => error);
	if (info instanceof Error) {
		if (info.code !== "ENOENT" && info.code !== "ENOTDIR") throw toArlError(info);
		if (isGlob(entry)) {
			const files = await glob(entry);
			if (files.length > 0) return files;
			throw new ArlError(
				"ARL_DATA",
				`${entry}: no file matches this pattern`,
				"Quote the pattern, and check its folder.",
			);
		}
		throw new ArlError("ARL_DATA", `${entry}: no such file`, await nearNames(entry));
	}
	if (info.isDirectory()) {
		const rows = (await readdir(entry).catch(() => [])).filter((name) => /\.jsonl?(\.gz|\.zst)?$/.test(name));
		const ext =
			rows.some((name) => name.endsWith(".json")) && !rows.some((name) => name.includes(".jsonl")) ? "json" : "jsonl";
		throw new ArlError(
			"ARL_DATA",
			`${entry}: a folder, where a file of rows is expected`,
			`Name the files, for example with a glob: --train_file '${join(entry, `*.${ext}`)}' (${rows.length} files of rows lie in it)`,
		);
	}
	return [entry];
}

/** What a file's first bytes say that it is. */
export type FileKind = "gzip" | "zstd" | "array" | "object" | "other";

const FIRST_BYTES = 64 * 1024;

/**
 * Tells the kind of a file by its content. Throws `ARL_DATA` for what is no file of rows: empty, UTF-16 or UTF-32,
 * Parquet.
 */
export async function sniff(path: string): Promise<FileKind> {
	const handle = await open(path, "r").catch((error: unknown) => {
		throw toArlError(error);
	});
	try {
		const { buffer, bytesRead } = await handle.read(Buffer.alloc(FIRST_BYTES), 0, FIRST_BYTES, 0);
		const head = buffer.subarray(0, bytesRead);
		if (bytesRead === 0)
			throw new ArlError("ARL_DATA", `${path}: the file is empty`, "Each line should be a JSON object.");
		if (head[0] === 0x1f && head[1] === 0x8b) return "gzip";
		if (head.length >= 4 && head.readUInt32LE(0) === 0xfd2fb528) return "zstd";
		if (head.subarray(0, 4).toString("latin1") === "PAR1") {
			throw new ArlError(
				"ARL_DATA",
				`${path}: a Parquet file; reading those is not built yet`,
				"Write the rows as JSONL.",
			);
		}
		checkEncoding(path, head);
		const start = head.subarray(0, 3).equals(BOM) ? 3 : 0;
		const first = head.subarray(start).find((byte) => byte !== 0x20 && byte !== 0x0a && byte !== 0x0d && byte !== 0x09);
		if (first === 0x5b) return "array";
		return first === 0x7b && /^\.json$/i.test(extname(path)) ? "object" : "other";
	} finally {
		await handle.close();
	}
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
