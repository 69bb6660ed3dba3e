/**
 * Chooses the files of a folder by the split in their names, following the layout of Hugging Face's Hub
 * (`data/train-00000-of-00004.parquet`). Looks at names only, and refuses to guess.
 */
import { readdir, realpath, stat } from "node:fs/promises";
import { basename, dirname, join, sep } from "node:path";
import { ArlError, toArlError } from "../../errors.js";

const ROW_FILE = /\.(jsonl|ndjson|json|parquet|csv|tsv)(\.(gz|zst|zstd))?$/i;

/** Files that describe a dataset or a program, and contain no rows. */
const NO_ROWS =
	/^(dataset_infos?|dataset_dict|state|config|package(-lock)?|tsconfig|tokenizer(_config)?|generation_config)\.json$/i;

/** Words for the splits; the first is the canonical name. */
const SPLITS = [
	["train", "training"],
	["validation", "valid", "val", "dev"],
	["test", "testing", "eval", "evaluation"],
];

/** The canonical name for any word of a split; other names stay as they are. */
function canonical(word: string): string {
	const lower = word.toLowerCase();
	return SPLITS.find((words) => words.includes(lower))?.[0] ?? lower;
}

/** A file below a folder. */
interface Found {
	/** Relative to the folder. */
	path: string;
	split: string | null;
}

/** Lists the files below a folder. `above`: the real paths of its parents: a link back to one of them is not followed. */
async function walk(folder: string, below = "", above: readonly string[] = []): Promise<string[]> {
	const here = join(folder, below);
	const [entries, real] = await Promise.all([readdir(here, { withFileTypes: true }), realpath(here)]).catch(
		(error: unknown) => {
			throw toArlError(error);
		},
	);
	if (above.includes(real)) return [];
	const files: string[] = [];
	for (const entry of entries) {
		if (/^[._]/.test(entry.name)) continue;
		const path = join(below, entry.name);
		const isFolder = entry.isDirectory() || (entry.isSymbolicLink() && (await leadsToFolder(join(folder, path))));
		if (!isFolder) files.push(path);
		else for (const file of await walk(folder, path, [...above, real])) files.push(file);
	}
	return files;
}

async function leadsToFolder(link: string): Promise<boolean> {
	return stat(link).then(
		(info) => info.isDirectory(),
		() => false,
	);
}

/** The split that a path names: by a word of the file's name, or by the whole name of a folder on the way. */
function splitOf(path: string, wanted: string | null): string | null {
	const known = new Set([...SPLITS.flat(), ...(wanted === null ? [] : [wanted.toLowerCase()])]);
	const words = basename(path)
		.replace(/\.[^-]*$/, "")
		.split(/[-._ ]/);
	const named = words.find((word) => known.has(word.toLowerCase()));
	if (named !== undefined) return canonical(named);
	const folder = dirname(path)
		.split(sep)
		.findLast((part) => known.has(part.toLowerCase()));
	return folder === undefined ? null : canonical(folder);
}

/** The format that a name's extension says. */
function formatOf(path: string): string {
	return (ROW_FILE.exec(path)?.[1] ?? "").toLowerCase().replace("ndjson", "jsonl");
}

function counted(files: Found[], label: (file: Found) => string): string {
	const counts = new Map<string, number>();
	for (const file of files) counts.set(label(file), (counts.get(label(file)) ?? 0) + 1);
	return [...counts].map(([name, count]) => `${name} (${count} ${count === 1 ? "file" : "files"})`).join(", ");
}

const splitLabel = ({ split }: Found) => split ?? "none";

/** Throws if shards of `name-00002-of-00004` are missing. */
function checkShards(folder: string, files: Found[]): void {
	const sets = new Map<string, { of: number; seen: Set<number> }>();
	for (const { path } of files) {
		const shard = /^(.*)-(\d+)-of-(\d+)\b/.exec(path);
		if (!shard) continue;
		const [, name = "", index, of] = shard;
		const key = `${name}-of-${of}`;
		const set = sets.get(key) ?? { of: Number(of), seen: new Set() };
		set.seen.add(Number(index));
		sets.set(key, set);
	}
	for (const [key, { of, seen }] of sets) {
		if (seen.size >= of) continue;
		const missing = Array.from({ length: of }, (_, i) => i).filter((i) => !seen.has(i));
		throw new ArlError(
			"ARL_DATA",
			`${folder}: ${missing.length} of ${of} parts of ${key} are missing: ${missing.slice(0, 5).join(", ")}${missing.length > 5 ? ", ..." : ""}`,
			"Fetch the missing files, or name the files to read with a pattern.",
		);
	}
}

/**
 * The files of a folder that belong to `split` (all if it is null), in the order of their names. Throws `ARL_DATA` if the
 * choice is ambiguous.
 */
export async function folderFiles(
	folder: string,
	split: string | null,
): Promise<{ files: string[]; notices: string[] }> {
	const all = await walk(folder);
	const rows: Found[] = all
		.filter((path) => ROW_FILE.test(path) && !NO_ROWS.test(basename(path)))
		.sort((a, b) => (a < b ? -1 : a > b ? 1 : 0))
		.map((path) => ({ path, split: splitOf(path, split) }));
	if (rows.length === 0) {
		const arrow = all.some((path) => path.endsWith(".arrow"));
		throw new ArlError(
			"ARL_DATA",
			`${folder}: the folder has no files of rows`,
			arrow
				? "Its .arrow files come from `save_to_disk`; write Parquet instead: dataset.to_parquet(...)"
				: "Rows are read from .jsonl, .json, .parquet, .csv and .tsv files, plain or compressed with gzip or zstd.",
		);
	}
	const wanted = split === null ? null : canonical(split);
	const named = rows.some((file) => file.split !== null);
	// If no name contains a split, all rows are training rows.
	const everything = wanted === null || (!named && wanted === "train");
	const chosen = everything ? rows : rows.filter((file) => file.split === wanted);
	if (chosen.length === 0) {
		throw new ArlError(
			"ARL_DATA",
			named
				? `${folder}: no file belongs to the split ${split}; there are ${counted(rows, splitLabel)}`
				: `${folder}: the names of its files contain no splits, and the split ${split} was requested`,
			"Choose another with --split, or name the files.",
		);
	}
	const folders = [...new Set(chosen.map(({ path }) => dirname(path)))];
	if (folders.length > 1) {
		throw new ArlError(
			"ARL_DATA",
			`${folder}: rows are in ${folders.length} of its folders: ${folders.slice(0, 5).join(", ")}${folders.length > 5 ? ", ..." : ""}`,
			`Name one of them, or the files with a pattern: --train_file '${join(folder, "**", `*.${formatOf(chosen[0]?.path ?? "")}`)}'`,
		);
	}
	const formats = [...new Set(chosen.map(({ path }) => formatOf(path)))];
	if (formats.length > 1) {
		throw new ArlError(
			"ARL_DATA",
			`${folder}: it contains files in ${formats.length} formats: ${counted(chosen, ({ path }) => formatOf(path))}; are they the same rows?`,
			`Name the files with a pattern: --train_file '${join(folder, folders[0] ?? "", `*.${formats[0]}`)}'`,
		);
	}
	checkShards(folder, chosen);
	const others = rows.filter((file) => !chosen.includes(file));
	const notices =
		others.length > 0
			? [
					`${folder}: ${chosen.length} of ${rows.length} files belong to the split ${wanted}; left out are ${counted(others, splitLabel)}`,
				]
			: [];
	return { files: chosen.map(({ path }) => join(folder, path)), notices };
}
