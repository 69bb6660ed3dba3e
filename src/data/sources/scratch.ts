/**
 * The folder for temporary files: decompressed files and spill files. It is on the disk that the caller names, and never in
 * memory.
 */
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";
import { toArlError } from "../../errors.js";
import type { Native } from "../../native.js";

/** What temporary files need from the core. */
export type ScratchNative = Pick<Native, "ScratchFolder">;

/**
 * The folder for commands without a `cache_dir`: the user's cache folder. The system's folder for temporary files is often in
 * memory, so it is used only if there is no other.
 */
export function userCacheDir(environment: NodeJS.ProcessEnv = process.env): string {
	const { XDG_CACHE_HOME } = environment;
	if (XDG_CACHE_HOME !== undefined && XDG_CACHE_HOME !== "") return join(XDG_CACHE_HOME, "arl");
	const home = homedir();
	return home === "" || home === "/" ? join(tmpdir(), "arl") : join(home, ".cache", "arl");
}

/** A folder for temporary files below `parent`, created at the first use and removed by `close`. */
export class Scratch {
	private folder: ReturnType<ScratchNative["ScratchFolder"]["create"]> | null = null;
	private files = 0;

	/** `parent` null: the user's cache folder, or the system's folder for temporary files if that one is not writable. */
	constructor(
		private readonly native: ScratchNative,
		private readonly parent: string | null = null,
	) {}

	/** The folder's path; creates it. Throws `ARL_IO` if that fails. */
	path(): string {
		this.folder ??= this.create();
		return this.folder.path;
	}

	/** A path in it that no other call has returned. */
	newFile(): string {
		this.files += 1;
		return join(this.path(), `rows-${this.files}`);
	}

	private create(): ReturnType<ScratchNative["ScratchFolder"]["create"]> {
		const { native, parent } = this;
		try {
			return native.ScratchFolder.create(parent ?? userCacheDir());
		} catch (error) {
			if (parent !== null) throw toArlError(error);
			return native.ScratchFolder.create(join(tmpdir(), "arl"));
		}
	}

	/** Removes the folder and everything in it; open files can still be read. */
	close(): void {
		this.folder?.close();
		this.folder = null;
	}
}
