/**
 * One run a folder: a file that names the process that trains in `output_dir`. What a killed process left is taken over.
 */
import { open, readFile, rm, unlink } from "node:fs/promises";
import { join } from "node:path";
import { ArlError, toArlError } from "../errors.js";
import { makeFolder } from "../folders.js";

const LOCK = ".arl-lock";

/** A process by its number and its start, since numbers are given again; null where it is no more. */
async function processName(pid: number): Promise<string | null> {
	try {
		const stat = await readFile(`/proc/${pid}/stat`, "utf8");
		// The name in parentheses may hold anything; the start is the 20th word behind it.
		return `${pid} ${stat.slice(stat.lastIndexOf(")") + 2).split(" ")[19]}`;
	} catch {
		try {
			// No /proc: whether the number is in use has to do.
			process.kill(pid, 0);
			return `${pid} -`;
		} catch {
			return null;
		}
	}
}

/**
 * Takes the folder for this process; makes it where it is missing. Returns what gives it back.
 *
 * @throws ArlError `ARL_STATE` while another process has it.
 */
export async function lockFolder(folder: string): Promise<() => Promise<void>> {
	const path = join(folder, LOCK);
	try {
		await makeFolder(folder);
		for (;;) {
			const handle = await open(path, "wx").catch((error: NodeJS.ErrnoException) => {
				if (error.code !== "EEXIST") throw error;
				return null;
			});
			if (handle) {
				await handle.writeFile((await processName(process.pid)) ?? `${process.pid} -`);
				await handle.close();
				return () => rm(path, { force: true });
			}
			const holder = await readFile(path, "utf8").catch(() => "");
			const pid = Number.parseInt(holder, 10);
			if (pid > 0 && (await processName(pid)) === holder) {
				throw new ArlError(
					"ARL_STATE",
					`output_dir: ${folder} is in use by another run (process ${pid})`,
					"Wait for it, stop it, or choose another output_dir.",
				);
			}
			await unlink(path).catch(() => {});
		}
	} catch (error) {
		throw toArlError(error);
	}
}
