/**
 * One run per folder: the process that trains in an `output_dir` holds the system's lock on a file there. However the process
 * ends, the system frees the lock; the file's text only tells people which process holds it.
 */
import { readFile } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import { exists, makeFolder, removeEmptyFolders } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";
import type { Native } from "../../native.js";

const LOCK = ".arl-lock";
/** Another start that is refused may remove the folder that it created, just before this one creates the file in it. */
const TRIES = 10;

/** A folder that belongs to this run. */
export interface LockedFolder {
	/** The topmost folder that was created for it; null: it existed. */
	made: string | null;
	release(): void;
}

/**
 * Takes the folder for this run, and creates it if it is missing.
 *
 * @throws ArlError `ARL_STATE` while another run holds it.
 */
export async function lockFolder({ FileLock }: Pick<Native, "FileLock">, folder: string): Promise<LockedFolder> {
	const path = join(folder, LOCK);
	for (let tries = 1; ; tries++) {
		let made: string | null = null;
		try {
			made = (await makeFolder(folder)) ?? null;
			const lock = FileLock.take(path, `process ${process.pid} on ${hostname()}\n`);
			if (lock !== null) return { made, release: () => lock.release() };
		} catch (error) {
			if (tries < TRIES && made === null && !(await exists(folder))) continue;
			if (made !== null) await removeEmptyFolders(folder, made);
			throw toArlError(error);
		}
		const holder = (await readFile(path, "utf8").catch(() => "")).trim();
		throw new ArlError(
			"ARL_STATE",
			`output_dir: ${folder} is in use by another run${/^process \d+ on \S+$/.test(holder) ? ` (${holder})` : ""}`,
			"Wait for it, stop it, or choose another output_dir.",
		);
	}
}
