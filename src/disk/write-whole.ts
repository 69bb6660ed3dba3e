/** Writes files so that a file under its final name is complete, even after a crash of the machine. */
import { open, rename, rm, stat } from "node:fs/promises";
import { toArlError } from "../errors.js";

/** The suffix of a file's name until it is complete. */
export const PARTIAL = ".partial";

/**
 * Forces a file or a folder to disk. Windows syncs only what is open for writing, and no folder: NTFS keeps names in its own
 * journal.
 */
export async function syncPath(path: string, platform: NodeJS.Platform = process.platform): Promise<void> {
	const windows = platform === "win32";
	if (windows && (await stat(path)).isDirectory()) return;
	const handle = await open(path, windows ? "r+" : "r");
	try {
		await handle.sync();
	} finally {
		await handle.close();
	}
}

/**
 * Lets `write` write a file under a temporary name, and renames it to `path` once it is on disk. If anything fails, the partial
 * file is removed, and an earlier file at `path` stays.
 *
 * @throws ArlError What `write` threw, or `ARL_IO`.
 */
export async function writeWhole<T>(path: string, write: (partial: string) => Promise<T>): Promise<T> {
	const partial = `${path}${PARTIAL}`;
	try {
		const result = await write(partial);
		await syncPath(partial);
		await rename(partial, path);
		return result;
	} catch (error) {
		await rm(partial, { force: true }).catch(() => {});
		throw toArlError(error);
	}
}
