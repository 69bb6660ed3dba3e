/** Folders on the disk. Knows nothing of what is put into them. */
import { mkdir } from "node:fs/promises";
import { resolve } from "node:path";

/**
 * Makes a folder and those above it, where they are not there.
 *
 * By its whole path: of a relative one Node's recursive `mkdir` tries forever once the working directory has been removed.
 */
export async function makeFolder(path: string): Promise<void> {
	await mkdir(resolve(path), { recursive: true });
}
