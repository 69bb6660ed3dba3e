/** Creates and removes folders. */
import { mkdir, rmdir, stat } from "node:fs/promises";
import { dirname, resolve } from "node:path";

/**
 * Creates a folder and its missing parents. Returns the topmost folder that this call created; undefined: none.
 *
 * Uses the absolute path: with a relative one, Node's recursive `mkdir` loops forever if the working directory was removed.
 */
export async function makeFolder(path: string): Promise<string | undefined> {
	return await mkdir(resolve(path), { recursive: true });
}

/** Removes `path` and its parents up to `topmost`, as long as they are empty. */
export async function removeEmptyFolders(path: string, topmost: string): Promise<void> {
	for (let folder = resolve(path); folder.startsWith(resolve(topmost)); folder = dirname(folder)) {
		try {
			await rmdir(folder);
		} catch {
			return;
		}
	}
}

/** Whether `path` exists. */
export async function exists(path: string): Promise<boolean> {
	return stat(path).then(
		() => true,
		() => false,
	);
}
