/**
 * An on-disk image cache addressed by content: `blobs/` stores bytes under their SHA-256, `urls/` maps a URL's SHA-256 to the
 * blob it returned. Files are renamed into place and verified on reading, so that several processes may share a folder.
 */
import { createHash, randomUUID } from "node:crypto";
import { readdir, readFile, rename, rm, stat, utimes, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { exists, makeFolder } from "../disk/folders.js";
import { toArlError } from "../errors.js";

/** A file's bytes; null: it does not exist. */
async function readIfThere(path: string): Promise<Buffer | null> {
	return readFile(path).catch((error: NodeJS.ErrnoException) => {
		if (error.code === "ENOENT") return null;
		throw toArlError(error);
	});
}

async function names(folder: string): Promise<string[]> {
	return readdir(folder).catch((error: NodeJS.ErrnoException) => {
		if (error.code === "ENOENT") return [];
		throw toArlError(error);
	});
}

/** Runs `action`, which needs the folder of `path`; creates that folder only after a failure, because it rarely is missing. */
async function inFolder(path: string, action: () => Promise<void>): Promise<void> {
	try {
		await action();
	} catch (error) {
		if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
		await makeFolder(dirname(path));
		await action();
	}
}

const sha256 = (content: string | Uint8Array) => createHash("sha256").update(content).digest("hex");

/** The share of its limit that pruning shrinks the cache to. */
const KEPT = 0.8;
/** The share of its limit that one process adds before it measures again: with `KEPT`, two processes stay within the limit. */
const UNCOUNTED = 0.1;
const STALE_MS = 60 * 60 * 1000;

/** A folder of cached images. */
export class ImageCache {
	/** Bytes added since the folder was last measured; infinite at first, so that the first `put` measures it. */
	private added = Number.POSITIVE_INFINITY;
	private pruning: Promise<void> | null = null;

	/** `maxBytes`: limit on all blobs together; the least recently used are evicted first. */
	constructor(
		private readonly folder: string,
		private readonly maxBytes: number,
	) {}

	private blob(hash: string): string {
		return join(this.folder, "blobs", hash.slice(0, 2), hash);
	}

	private entry(url: string): string {
		// Only a hash: a URL may contain a key, which must not be written to disk.
		const hash = sha256(url);
		return join(this.folder, "urls", hash.slice(0, 2), hash);
	}

	/** The bytes that a URL returned; null: not cached, or damaged. */
	async get(url: string): Promise<Uint8Array | null> {
		const entry = await readIfThere(this.entry(url));
		if (entry === null) return null;
		const hash = entry.toString("latin1").trim();
		if (!/^[0-9a-f]{64}$/.test(hash)) return null;
		const path = this.blob(hash);
		const bytes = await readIfThere(path);
		if (bytes === null) return null;
		if (sha256(bytes) !== hash) {
			await rm(path, { force: true });
			return null;
		}
		const now = new Date();
		// Another process may have evicted it meanwhile; the bytes are already read.
		await utimes(path, now, now).catch(() => {});
		return bytes;
	}

	/** Stores the bytes of a URL. */
	async put(url: string, bytes: Uint8Array): Promise<void> {
		if (bytes.length > this.maxBytes * KEPT) return;
		const hash = sha256(bytes);
		const path = this.blob(hash);
		try {
			// A blob of that name and length is the same, unless it is damaged, which `get` detects.
			const there = await stat(path).catch(() => null);
			if (there?.size !== bytes.length) {
				await this.write(path, bytes);
				this.added += bytes.length;
			}
			await this.write(this.entry(url), hash);
		} catch (error) {
			throw toArlError(error);
		}
		if (this.added > this.maxBytes * UNCOUNTED) {
			this.pruning ??= this.prune().finally(() => {
				this.pruning = null;
			});
			await this.pruning;
		}
	}

	private async write(path: string, content: string | Uint8Array): Promise<void> {
		const temporary = join(this.folder, "tmp", `${process.pid}-${randomUUID()}`);
		try {
			await inFolder(temporary, () => writeFile(temporary, content));
			await inFolder(path, () => rename(temporary, path));
		} catch (error) {
			await rm(temporary, { force: true });
			// Windows replaces no file that another process has open: what is there is used, or fetched again.
			if (process.platform === "win32" && (await exists(path))) return;
			throw error;
		}
	}

	/** Measures the folder; evicts the least recently used blobs above the limit, and removes what killed processes left. */
	private async prune(): Promise<void> {
		this.added = 0;
		for (const name of await names(join(this.folder, "tmp"))) {
			const path = join(this.folder, "tmp", name);
			const info = await stat(path).catch(() => null);
			if (info && Date.now() - info.mtimeMs > STALE_MS) await rm(path, { force: true });
		}
		const blobs: { path: string; bytes: number; used: number }[] = [];
		for (const part of await names(join(this.folder, "blobs"))) {
			for (const name of await names(join(this.folder, "blobs", part))) {
				const path = join(this.folder, "blobs", part, name);
				const info = await stat(path).catch(() => null);
				if (info) blobs.push({ path, bytes: info.size, used: info.mtimeMs });
			}
		}
		let total = blobs.reduce((sum, { bytes }) => sum + bytes, 0);
		if (total <= this.maxBytes * (1 - UNCOUNTED)) return;
		blobs.sort((a, b) => a.used - b.used);
		for (const { path, bytes } of blobs) {
			if (total <= this.maxBytes * KEPT) break;
			await rm(path, { force: true });
			total -= bytes;
		}
		await this.removeDangling();
	}

	/** Removes the entries of URLs whose blob is gone. */
	private async removeDangling(): Promise<void> {
		for (const part of await names(join(this.folder, "urls"))) {
			for (const name of await names(join(this.folder, "urls", part))) {
				const path = join(this.folder, "urls", part, name);
				const hash = (await readIfThere(path))?.toString("latin1").trim() ?? "";
				if (!(await exists(this.blob(hash)))) await rm(path, { force: true });
			}
		}
	}
}
