/** Locks of files within this process, in place of the system's. */
import { rmSync, writeFileSync } from "node:fs";

const locked = new Set<string>();

/** As `FileLock.take` of the core. */
export function takeLock(path: string, note: string) {
	if (locked.has(path)) return null;
	writeFileSync(path, note);
	locked.add(path);
	return {
		release: () => {
			rmSync(path, { force: true });
			locked.delete(path);
		},
	};
}
