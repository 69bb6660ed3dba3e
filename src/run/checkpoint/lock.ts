/**
 * One run a folder: a file in `output_dir` that the system has locked for the process that trains there. However that process
 * ends, the lock is free then; the file is only for people to read who has it.
 */
import { readFile } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import { exists, makeFolder, removeEmptyFolders } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";
import type { Native } from "../../native.js";

const LOCK = ".arl-lock";
/** Another start that is refused may remove the folder that it has made, just before the file is created in it. */
const TRIES = 10;

/** A folder that belongs to this run. */
export interface LockedFolder {
	/** The topmost folder that was made for it; null: it was there. */
	made: string | null;
	release(): void;
}

/**
 * Takes the folder for this run; makes it where it is missing.
 *
 * @throws ArlError `ARL_STATE` while another run has it.
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
