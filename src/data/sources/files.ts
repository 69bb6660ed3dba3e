/**
 * Resolves what a user names (files, folders, globs) to the files that will be read, and explains names that match nothing.
 * Looks at names only; `sniff.ts` determines by content what a file is.
 */
import { readdir, stat } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { editDistance } from "../../config/values.js";
import { ArlError, toArlError } from "../../errors.js";
import { folderFiles } from "./folder.js";
import { glob, isGlob } from "./glob.js";

/** The hint for a name that does not exist: similar names in its folder, or that the folder is missing. */
async function nearNames(path: string): Promise<string> {
	const folder = dirname(path);
	const name = basename(path);
	const entries = await readdir(folder).catch(() => null);
	if (entries === null)
		return `The folder ${folder} does not exist either; relative paths start at the working directory.`;
	const limit = Math.max(2, Math.floor(name.length / 3)) + 1;
	const near = entries
		.map((entry) => ({ entry, far: editDistance(entry.toLowerCase(), name.toLowerCase(), limit) }))
		.filter(({ far }) => far < limit)
		.sort((a, b) => a.far - b.far)
		.slice(0, 3)
		.map(({ entry }) => join(folder, entry));
	if (near.length > 0) return `Did you mean ${near.join(" or ")}?`;
	return "Check the path; relative paths start at the working directory.";
}

/** The files that one name resolves to, and what a user should know about the choice. */
export interface ResolvedFiles {
	files: string[];
	/** Whether the name is a folder. */
	folder: boolean;
	notices: string[];
}

/**
 * The files that one entry of `train_file` names, in the order in which they are read. For a folder these are the files of the
 * split, or all if it is null. Throws `ARL_DATA`.
 */
export async function resolveFiles(entry: string, split: string | null): Promise<ResolvedFiles> {
	const info = await stat(entry).catch((error: NodeJS.ErrnoException) => error);
	if (info instanceof Error) {
		if (info.code !== "ENOENT" && info.code !== "ENOTDIR") throw toArlError(info);
		if (isGlob(entry)) {
			const files = await glob(entry);
			if (files.length > 0) return { files, folder: false, notices: [] };
			throw new ArlError(
				"ARL_DATA",
				`${entry}: no file matches this pattern`,
				"Quote the pattern, and check its folder.",
			);
		}
		throw new ArlError("ARL_DATA", `${entry}: no such file`, await nearNames(entry));
	}
	if (info.isDirectory()) return { ...(await folderFiles(entry, split)), folder: true };
	return { files: [entry], folder: false, notices: [] };
}
