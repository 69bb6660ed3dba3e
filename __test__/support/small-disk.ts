/** Small file systems for tests that fill them. */
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, statfsSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll } from "vitest";

const mount = (...words: string[]) => spawnSync("mount", words, { encoding: "utf8" }).status === 0;

/** A file system in memory that can be made smaller and larger. */
export class SmallDisk {
	private constructor(readonly path: string) {}

	/** Null, and a line on stderr, where this user may not mount one. The test file's end takes it away. */
	static make(test: string): SmallDisk | null {
		const path = mkdtempSync(join(tmpdir(), "arl-disk-"));
		if (process.platform !== "linux" || !mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", path)) {
			rmSync(path, { recursive: true });
			process.stderr.write(`SKIPPED: ${test}: only root may mount a small file system\n`);
			return null;
		}
		afterAll(() => {
			spawnSync("umount", ["-l", path]);
			rmSync(path, { recursive: true, force: true });
		});
		return new SmallDisk(path);
	}

	/** The part of it that is in use. */
	usedKib(): number {
		const { blocks, bfree, bsize } = statfsSync(this.path);
		return ((blocks - bfree) * bsize) / 1024;
	}

	/** Sets its size. */
	resize(kib: number): void {
		if (!mount("-o", `remount,size=${kib}k`, this.path)) throw new Error(`${this.path}: no file system of ${kib} KiB`);
	}
}
