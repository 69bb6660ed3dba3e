/** Folders on the disk. Knows nothing of what is put into them. */
import { mkdir, rmdir, stat } from "node:fs/promises";
import { dirname, resolve } from "node:path";

/**
 * Makes a folder and those above it, where they are not there. Returns the topmost one that this call made; undefined: none.
 *
 * By its whole path: of a relative one Node's recursive `mkdir` tries forever once the working directory has been removed.
 */
export async function makeFolder(path: string): Promise<string | undefined> {
	return await mkdir(resolve(path), { recursive: true });
}

/** Removes `path` and the folders above it up to `topmost`, as far as they are empty. */
export async function removeEmptyFolders(path: string, topmost: string): Promise<void> {
	for (let folder = resolve(path); folder.startsWith(resolve(topmost)); folder = dirname(folder)) {
		try {
			await rmdir(folder);
		} catch {
			return;
		}
	}
}

/** Whether there is anything at `path`. */
export async function exists(path: string): Promise<boolean> {
	return stat(path).then(
		() => true,
		() => false,
	);
}
