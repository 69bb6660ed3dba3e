/** Creates and removes folders. */
import { mkdir, rmdir, stat } from "node:fs/promises";
import { dirname, resolve } from "node:path";

/**
 * Creates a folder and its missing parents. Returns the topmost folder that this call created; undefined: none.
 *
 * One folder at a time: Node's recursive `mkdir` loops forever where a folder cannot be created although its parent exists
 * (`/proc/out`), or where the working directory was removed.
 */
export async function makeFolder(path: string): Promise<string | undefined> {
	const missing: string[] = [];
	for (let folder = resolve(path); !(await exists(folder)); folder = dirname(folder)) {
		missing.push(folder);
		// A drive of Windows that is not there has no parent.
		if (dirname(folder) === folder) break;
	}
	const created: string[] = [];
	// What exists and is no folder is an error too.
	for (const folder of missing.length > 0 ? missing.reverse() : [resolve(path)]) {
		try {
			await mkdir(folder);
			created.push(folder);
		} catch (error) {
			// It was there, or another process was quicker.
			const isFolder = await stat(folder).then(
				(found) => found.isDirectory(),
				() => false,
			);
			if (!isFolder) throw error;
		}
	}
	return created[0];
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
