/** `best` and `latest` in `output_dir`: symbolic links to checkpoints. Whatever else has such a name stays as it is. */
import { lstat, readlink, rename, rm, symlink } from "node:fs/promises";
import { basename, join } from "node:path";
import { toArlError } from "../../errors.js";
import { CHECKPOINT_NAME } from "./checkpoint.js";

export const BEST_LINK = "best";
export const LATEST_LINK = "latest";
export const LINKS: readonly string[] = [BEST_LINK, LATEST_LINK];

/** How file systems refuse symbolic links. */
const NO_LINKS: ReadonlySet<string> = new Set(["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL"]);

/** The checkpoint's name that the link has; null: there is no link of this program. */
async function targetOf(path: string): Promise<string | null> {
	const target = await readlink(path).catch(() => null);
	return target !== null && CHECKPOINT_NAME.test(target) ? target : null;
}

/** Whether `output_dir` has this link, and this program made it. */
export async function isLink(outputDir: string, name: string): Promise<boolean> {
	return LINKS.includes(name) && (await targetOf(join(outputDir, name))) !== null;
}

/** Points a link at a checkpoint of the same folder; null: removes it. A reader finds the old checkpoint or the new one. */
export async function setLink(outputDir: string, name: string, checkpoint: string | null): Promise<void> {
	const path = join(outputDir, name);
	const target = await targetOf(path);
	const wanted = checkpoint === null ? null : basename(checkpoint);
	if (target === wanted) return;
	try {
		// A user's own file or folder.
		if (target === null && (await lstat(path).catch(() => null)) !== null) return;
		if (wanted === null) return await rm(path);
		const partial = join(outputDir, `.${name}.partial`);
		await rm(partial, { force: true });
		await symlink(wanted, partial, "dir");
		// Windows replaces no link to a folder: there a reader may find none for a moment.
		if (process.platform === "win32" && target !== null) await rm(path, { force: true });
		await rename(partial, path);
	} catch (error) {
		// A run does not end because its file system has no symbolic links.
		if (NO_LINKS.has((error as NodeJS.ErrnoException).code ?? "")) return;
		throw toArlError(error, path);
	}
}
