/** Writing files so that one that has its name is whole, also where the machine stopped. */
import { open, rename, rm } from "node:fs/promises";
import { toArlError } from "../errors.js";

/** What a file's name ends with until all of it is written. */
export const PARTIAL = ".partial";

/** Forces a file or a folder to the disk. */
export async function syncPath(path: string): Promise<void> {
	const handle = await open(path, "r");
	try {
		await handle.sync();
	} finally {
		await handle.close();
	}
}

/**
 * Writes a file under another name, which `write` gets, and renames it to `path` once all of it is on the disk. When anything
 * fails, the partial file is removed, and what was at `path` before stays.
 *
 * @throws ArlError what `write` threw, or `ARL_IO`.
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
