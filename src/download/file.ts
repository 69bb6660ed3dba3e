/**
 * Fetches a file so that under its final name it is whole: resumed where an earlier attempt was broken off, checked by its
 * published hash, renamed last. Knows no server: the caller opens the content at an offset.
 */
import { createHash, type Hash } from "node:crypto";
import { createReadStream } from "node:fs";
import { open, readdir, rename, rm, stat } from "node:fs/promises";
import { hostname } from "node:os";
import { basename, dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { makeFolder } from "../disk/folders.js";
import { syncPath } from "../disk/write-whole.js";
import { ArlError, toArlError } from "../errors.js";
import { isPassing, mayPass } from "./fetch.js";

/** A published hash: SHA-256 of the content, or git's id of a blob (SHA-1 of a header and the content). */
export interface Digest {
	kind: "sha256" | "git-sha1";
	hex: string;
}

/** A file to fetch. */
export interface WantedFile {
	/** How messages call it. */
	name: string;
	/** Its final place. */
	path: string;
	/** Bytes; null: not known before it is fetched. */
	size: number | null;
	digest: Digest;
	/** Opens the content at `offset`, or at 0 where the server cannot do so. */
	open(offset: number): Promise<{ content: AsyncIterable<Uint8Array>; offset: number }>;
	/** Turns what broke the content off into an error. */
	broken(thrown: unknown): ArlError;
	/** What to do where the disk is full. */
	roomHint: string;
}

export interface FetchOptions {
	signal?: AbortSignal | null;
	/** Called with the number of bytes that are there, after each piece. */
	progress?: (bytes: number) => void;
	/** Milliseconds before the second attempt; doubled before each further one. Only tests set it. */
	pause?: number;
}

/** Attempts in a row that bring nothing new, after which the file is given up. */
const ATTEMPTS = 5;
const PAUSE_MILLISECONDS = 1000;

/**
 * Fetches `file`. What is there of an earlier attempt is kept, also where this one fails.
 *
 * @throws ArlError `ARL_NETWORK` where the content cannot be fetched or has another hash, `ARL_IO` where it cannot be written,
 * `ARL_INTERRUPTED` where the signal ended it.
 */
export async function fetchFile(file: WantedFile, options: FetchOptions = {}): Promise<void> {
	// Another call of this process may be fetching it.
	const other = running.get(file.path);
	if (other !== undefined) return await other;
	const own = fetchAlone(file, options);
	running.set(file.path, own);
	return await own.finally(() => running.delete(file.path));
}

const running = new Map<string, Promise<void>>();

async function fetchAlone(file: WantedFile, options: FetchOptions): Promise<void> {
	await makeFolder(dirname(file.path));
	const partial = await claim(file.path);
	try {
		await fill(file, partial, options);
		await syncPath(partial);
		await rename(partial, file.path);
	} catch (thrown) {
		await release(partial, file.path);
		throw withRoomHint(thrown, file);
	}
}

/** Appends to the partial file until it is whole and has the published hash. */
async function fill(
	file: WantedFile,
	partial: string,
	{ signal = null, progress, pause = PAUSE_MILLISECONDS }: FetchOptions,
) {
	let fresh = (await sizeOf(partial)) === 0;
	for (let failures = 0; ; ) {
		const before = await sizeOf(partial);
		try {
			const hash = await append(file, partial, signal, progress ?? (() => {}));
			if (hash === file.digest.hex) return;
			await rm(partial, { force: true });
			// The part of an earlier attempt may have been of another file.
			if (!fresh) {
				fresh = true;
				continue;
			}
			throw new ArlError(
				"ARL_NETWORK",
				`${file.name} does not have its published hash: expected ${file.digest.kind} ${file.digest.hex}, and it has ${hash}`,
				"Something between the server and this machine changes what it sends (a proxy or a mirror), or the file was replaced. It was not kept; try again.",
			);
		} catch (thrown) {
			const error = thrown instanceof ArlError ? thrown : toArlError(thrown);
			if (signal?.aborted) throw new ArlError("ARL_INTERRUPTED", `interrupted while fetching ${file.name}`);
			failures = (await sizeOf(partial)) > before ? 1 : failures + 1;
			if (!isPassing(error) || failures >= ATTEMPTS) throw error;
			await sleep(pause * 2 ** (failures - 1), undefined, signal === null ? {} : { signal }).catch(() => {});
		}
	}
}

/** Fetches what the partial file lacks. Returns the hash of all of it. */
async function append(
	file: WantedFile,
	partial: string,
	signal: AbortSignal | null,
	progress: (bytes: number) => void,
): Promise<string> {
	let had = await sizeOf(partial);
	if (file.size !== null && had > file.size) {
		await rm(partial);
		had = 0;
	}
	let size = file.size;
	let at = had;
	let hash: Hash | null = null;
	if (had === 0 || had !== file.size) {
		const { content, offset } = await file.open(had);
		const target = await open(partial, offset === 0 ? "w" : "a");
		try {
			at = offset;
			if (size !== null) hash = await hashOf(file.digest, size, partial, at);
			progress(at);
			const pieces = content[Symbol.asyncIterator]();
			for (;;) {
				const next = await pieces.next().catch((thrown: unknown) => {
					throw signal?.aborted ? thrown : mayPass(file.broken(thrown));
				});
				if (next.done) break;
				const { value } = next;
				if (size !== null && at + value.length > size) throw tooLong(file, size);
				await target.appendFile(value);
				hash?.update(value);
				at += value.length;
				progress(at);
			}
		} finally {
			await target.close();
		}
		size ??= at;
		if (at < size) throw mayPass(file.broken(new Error(`${size - at} of ${size} bytes are missing`)));
	}
	hash ??= await hashOf(file.digest, size ?? at, partial, at);
	return hash.digest("hex");
}

function tooLong(file: WantedFile, size: number): ArlError {
	return new ArlError(
		"ARL_NETWORK",
		`${file.name} is longer than the ${size} bytes that were published`,
		"Something between the server and this machine changes what it sends. Try again, or without a proxy.",
	);
}

/** The hash of the first `bytes` of a file, to be continued. */
async function hashOf({ kind }: Digest, size: number, path: string, bytes: number): Promise<Hash> {
	const hash = createHash(kind === "sha256" ? "sha256" : "sha1");
	// https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
	if (kind === "git-sha1") hash.update(`blob ${size}\0`);
	if (bytes > 0) for await (const piece of createReadStream(path, { end: bytes - 1 })) hash.update(piece as Buffer);
	return hash;
}

async function sizeOf(path: string): Promise<number> {
	return stat(path).then(
		({ size }) => size,
		() => 0,
	);
}

const RESTING = ".arl.incomplete";
const HELD = /\.arl-(.+)-(\d+)\.incomplete$/;

/**
 * Takes what an earlier attempt has left of the file: the name says which process works on it, so that two never write to one
 * file. What another machine's process holds is left alone.
 */
async function claim(path: string): Promise<string> {
	const own = `${path}.arl-${hostname()}-${process.pid}.incomplete`;
	const names = await readdir(dirname(path));
	const left = names.filter((name) => {
		if (!name.startsWith(`${basename(path)}.arl`)) return false;
		if (name === `${basename(path)}${RESTING}`) return true;
		const [, host, pid] = HELD.exec(name) ?? [];
		return host === hostname() && !isAlive(Number(pid));
	});
	for (const name of left) {
		const taken = await rename(join(dirname(path), name), own).then(
			() => true,
			() => false,
		);
		if (taken) break;
	}
	return own;
}

async function release(own: string, path: string): Promise<void> {
	if ((await sizeOf(own)) === 0) await rm(own, { force: true }).catch(() => {});
	else await rename(own, `${path}${RESTING}`).catch(() => {});
}

function isAlive(pid: number): boolean {
	if (pid === process.pid) return false;
	try {
		process.kill(pid, 0);
		return true;
	} catch (error) {
		return (error as NodeJS.ErrnoException).code === "EPERM";
	}
}

/** An error of a full disk, with what to do about this file. */
function withRoomHint(thrown: unknown, { name, roomHint }: WantedFile): ArlError {
	const error = toArlError(thrown);
	const { code } = (error.cause ?? {}) as NodeJS.ErrnoException;
	if (code !== "ENOSPC" && code !== "EDQUOT") return error;
	const message = `${name}: the disk is full: ${error.message}`;
	return new ArlError("ARL_IO", message, `${roomHint} What was fetched is kept.`, { cause: thrown });
}
