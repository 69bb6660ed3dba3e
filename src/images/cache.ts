/**
 * Images on disk, by content: `blobs/` holds bytes under their SHA-256, `urls/` says under a URL's SHA-256 which blob it gave.
 * Files appear whole or not at all and are checked as they are read, so that several processes may share a folder.
 */
import { createHash, randomUUID } from "node:crypto";
import { readdir, readFile, rename, rm, stat, utimes, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { exists, makeFolder } from "../disk/folders.js";
import { toArlError } from "../errors.js";

/** A file's bytes; null: there is no such file. */
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

/** Does what needs the folder of `path`, and makes that folder where it is missing, which is seldom. */
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

/** Part of its bound that the cache is cut down to. */
const KEPT = 0.8;
/** Part of its bound that one process adds before it counts again: with `KEPT`, two processes stay within the bound. */
const UNCOUNTED = 0.1;
const STALE_MS = 60 * 60 * 1000;

/** A folder of images. */
export class ImageCache {
	/** Bytes added since the folder was last counted; at first as if there were many. */
	private added = Number.POSITIVE_INFINITY;
	private pruning: Promise<void> | null = null;

	/** `maxBytes`: bound of all blobs together; the ones that were used longest ago go first. */
	constructor(
		private readonly folder: string,
		private readonly maxBytes: number,
	) {}

	private blob(hash: string): string {
		return join(this.folder, "blobs", hash.slice(0, 2), hash);
	}

	private entry(url: string): string {
		// Only a hash: a URL may hold a key, which must not lie about on a disk.
		const hash = sha256(url);
		return join(this.folder, "urls", hash.slice(0, 2), hash);
	}

	/** The bytes that a URL gave; null: not here, or not whole any more. */
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
		// Another process may have taken it away meanwhile; the bytes are here.
		await utimes(path, now, now).catch(() => {});
		return bytes;
	}

	/** Keeps the bytes of a URL. */
	async put(url: string, bytes: Uint8Array): Promise<void> {
		if (bytes.length > this.maxBytes * KEPT) return;
		const hash = sha256(bytes);
		const path = this.blob(hash);
		try {
			// A blob of that name and length is the same, unless it is damaged, which reading finds.
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
			throw error;
		}
	}

	/** Counts the folder; takes away what was used longest ago where it is too much, and what killed processes left. */
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
		await this.removeLost();
	}

	/** Takes away the entries of URLs whose blob is gone. */
	private async removeLost(): Promise<void> {
		for (const part of await names(join(this.folder, "urls"))) {
			for (const name of await names(join(this.folder, "urls", part))) {
				const path = join(this.folder, "urls", part, name);
				const hash = (await readIfThere(path))?.toString("latin1").trim() ?? "";
				if (!(await exists(this.blob(hash)))) await rm(path, { force: true });
			}
		}
	}
}
