/**
 * The cache of the Hugging Face Hub: `blobs` by their hashes, `snapshots/COMMIT` with links to them, `refs/REVISION` with
 * commits. Other programs read and write the same folders; what is there is taken as it is.
 */
import { copyFile, readdir, readFile, readlink, rename, rm, statfs, symlink, writeFile } from "node:fs/promises";
import { dirname, join, relative } from "node:path";
import { exists, makeFolder } from "../disk/folders.js";
import { fetchFile } from "../download/file.js";
import { ArlError, toArlError } from "../errors.js";
import type { HubClient, HubFile } from "./client.js";
import { type Repo, repoFolder } from "./names.js";

/** How far fetching is: bytes of the files that were missing when it began. */
export interface FetchProgress {
	/** What is fetched, for people. */
	name: string;
	bytes: number;
	totalBytes: number;
	/** Since it began. */
	seconds: number;
}

export interface FetchCalls {
	signal: AbortSignal | null;
	progress: (progress: FetchProgress) => void;
	/** Milliseconds before a second attempt; only tests set it. */
	pause?: number;
}

const COMMIT = /^[0-9a-f]{40}$/;

/** The commit of a revision as the cache has it; null: it does not. */
export async function cachedCommit(cache: string, repo: Repo): Promise<string | null> {
	const { revision } = repo;
	if (COMMIT.test(revision)) return (await exists(snapshotFolder(cache, repo, revision))) ? revision : null;
	const commit = await readFile(join(repoFolder(cache, repo), "refs", ...revision.split("/")), "utf8").catch(() => "");
	return COMMIT.test(commit.trim()) ? commit.trim() : null;
}

/** Records the commit of a revision. */
export async function rememberCommit(cache: string, repo: Repo, commit: string): Promise<void> {
	if (repo.revision === commit) return;
	const ref = join(repoFolder(cache, repo), "refs", ...repo.revision.split("/"));
	await makeFolder(dirname(ref)).catch(refused);
	await writeFile(ref, commit).catch(refused);
}

/** The folder of a commit's files. */
export function snapshotFolder(cache: string, repo: Repo, commit: string): string {
	return join(repoFolder(cache, repo), "snapshots", commit);
}

/** The files below a folder of a snapshot, relative to the snapshot. */
export async function cachedFiles(snapshot: string, folder = ""): Promise<string[]> {
	const entries = await readdir(join(snapshot, folder), { withFileTypes: true }).catch(() => []);
	const found = await Promise.all(
		entries.map(async (entry) => {
			const path = folder === "" ? entry.name : `${folder}/${entry.name}`;
			return entry.isDirectory() ? cachedFiles(snapshot, path) : (await exists(join(snapshot, path))) ? [path] : [];
		}),
	);
	return found.flat();
}

/**
 * Fetches the files that the snapshot lacks. Returns the number of bytes that were fetched.
 *
 * @throws ArlError `ARL_NETWORK`, `ARL_IO` or `ARL_INTERRUPTED`; what was fetched before stays.
 */
export async function fillSnapshot(
	client: HubClient,
	cache: string,
	repo: Repo,
	commit: string,
	files: readonly HubFile[],
	{ signal, progress, ...more }: FetchCalls,
): Promise<number> {
	const folder = repoFolder(cache, repo);
	const snapshot = snapshotFolder(cache, repo, commit);
	const missing: HubFile[] = [];
	for (const file of files) if (!(await exists(join(snapshot, file.path)))) missing.push(file);
	const blobs = new Map<string, HubFile>();
	for (const file of missing) {
		if (!(await exists(join(folder, "blobs", file.etag)))) blobs.set(file.etag, file);
	}
	const totalBytes = [...blobs.values()].reduce((sum, { size }) => sum + size, 0);
	await makeFolder(join(folder, "blobs")).catch(refused);
	await checkRoom(folder, repo.name, totalBytes);
	const started = performance.now();
	const report = (bytes: number) =>
		progress({ name: repo.name, bytes, totalBytes, seconds: (performance.now() - started) / 1000 });
	let done = 0;
	for (const { path, size, etag, kind } of blobs.values()) {
		await fetchFile(
			{
				name: `${repo.name}/${path}`,
				path: join(folder, "blobs", etag),
				size,
				digest: { kind, hex: etag },
				open: (offset) => client.open(repo, commit, path, offset),
				broken: (thrown) => client.broken(repo, commit, path, thrown),
				roomHint: ROOM_HINT,
			},
			{ signal, progress: (bytes) => report(done + bytes), ...more },
		);
		done += size;
	}
	for (const { path, etag } of missing) await place(join(folder, "blobs", etag), join(snapshot, path));
	return totalBytes;
}

const ROOM_HINT = "Free some space, or set HF_HOME to a folder on another disk.";

/** Throws `ARL_IO` where the disk has no room for so many bytes. */
async function checkRoom(folder: string, name: string, bytes: number): Promise<void> {
	const { bavail, bsize } = await statfs(folder);
	const free = bavail * bsize;
	// What an earlier attempt has left counts as used already; such an attempt may go on to the last byte.
	const left = await readdir(join(folder, "blobs"));
	if (bytes <= free || left.some((entry) => entry.endsWith(".incomplete"))) return;
	const gigabytes = (value: number) => `${(value / 1e9).toFixed(2)} GB`;
	throw new ArlError(
		"ARL_IO",
		`${name}: ${gigabytes(bytes)} are to be fetched, and ${gigabytes(free)} are free on the disk of ${folder}`,
		ROOM_HINT,
	);
}

/** Puts content under a file's name in a snapshot: a relative link, or where links are not allowed the content itself. */
async function place(blob: string, path: string): Promise<void> {
	await makeFolder(dirname(path)).catch(refused);
	const target = relative(dirname(path), blob);
	try {
		await symlink(target, path);
	} catch (thrown) {
		const { code } = thrown as NodeJS.ErrnoException;
		// Another process was faster, or a link dangles.
		if (code === "EEXIST") {
			if ((await readlink(path).catch(() => null)) === target) return;
			await rm(path, { force: true });
			await symlink(target, path).catch(refused);
			return;
		}
		const partial = `${path}.incomplete`;
		await copyFile(blob, partial)
			.then(() => rename(partial, path))
			.catch(refused);
	}
}

function refused(thrown: unknown): never {
	throw toArlError(thrown);
}
