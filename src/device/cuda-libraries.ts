/**
 * NVIDIA's libraries for the CUDA addon, put into arl's cache out of wheels of the Python package index, without Python: pinned
 * by version and hash, unpacked next to what is there, and put in its place when all of it is whole.
 */
import { createWriteStream } from "node:fs";
import { readdir, readFile, rename, rm, stat, statfs, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { pipeline } from "node:stream/promises";
import { exists, makeFolder } from "../disk/folders.js";
import { fetchFile } from "../download/file.js";
import { type FoundWheel, PythonIndex, pipIndexes, type Wheel } from "../download/python-index.js";
import { ArlError, toArlError } from "../errors.js";
import type { Native } from "../native.js";

/** How far an installation is. */
export interface InstallProgress {
	/** The wheel that is fetched or unpacked. */
	name: string;
	phase: "fetching" | "unpacking";
	/** Bytes of all wheels so far. */
	bytes: number;
	/** Of all wheels; null: an index that does not say how large they are. */
	totalBytes: number | null;
}

export interface InstallCalls {
	signal: AbortSignal | null;
	progress: (progress: InstallProgress) => void;
}

/** What an installation found or did. */
export interface Installed {
	folder: string;
	/** False: all of it was there. */
	changed: boolean;
	bytes: number;
	from: string;
}

type Core = Pick<Native, "cudaFolder" | "cudaWheels">;

const STAMP = "arl-libraries.json";
/** What the wheels take once they are unpacked, next to themselves. */
const UNPACKED = 2;

function places(native: Core): { libraries: string; wheels: string; staging: string } {
	const folder = native.cudaFolder();
	if (folder === null) {
		throw new ArlError("ARL_DEVICE", "there is no cache folder: neither HOME nor ARL_CACHE is set", "Set ARL_CACHE.");
	}
	return { libraries: join(folder, "libraries"), wheels: join(folder, "wheels"), staging: join(folder, "unpacking") };
}

/** The folder with the pinned libraries, if `arl cuda install` has put them there; null: it has not. */
export async function installedLibraries(native: Core): Promise<string | null> {
	if (native.cudaFolder() === null) return null;
	const { libraries } = places(native);
	const stamp = await readFile(join(libraries, STAMP), "utf8").catch(() => "");
	return stamp === JSON.stringify(native.cudaWheels()) ? libraries : null;
}

/**
 * Fetches what is missing and unpacks it. An installation that was broken off resumes.
 *
 * @throws ArlError `ARL_NETWORK`, `ARL_IO`, `ARL_INTERRUPTED`; libraries that were there before stay.
 */
export async function installLibraries(
	native: Core,
	{ signal, progress }: InstallCalls,
	system: { platform: string; arch: string } = process,
): Promise<Installed> {
	if (system.platform !== "linux" || system.arch !== "x64") {
		const message = `CUDA is supported on Linux x64; this is ${system.platform} ${system.arch}`;
		throw new ArlError("ARL_DEVICE", message, "Use the CPU.");
	}
	const { libraries, wheels, staging } = places(native);
	const there = await installedLibraries(native);
	if (there !== null) return { folder: there, changed: false, bytes: 0, from: "" };
	const index = new PythonIndex(await pipIndexes(), signal);
	try {
		const found: FoundWheel[] = [];
		for (const wheel of native.cudaWheels()) found.push(await index.find(wheel));
		const sizes = found.map(({ size }) => size);
		const total = sizes.reduce<number | null>((sum, size) => (sum === null || size === null ? null : sum + size), 0);
		await makeFolder(wheels);
		await checkRoom(wheels, found);
		let done = 0;
		for (const wheel of found) {
			const report = (bytes: number) =>
				progress({ name: wheel.name, phase: "fetching", bytes: done + bytes, totalBytes: total });
			done += await fetchWheel(index, wheel, wheelFile(wheels, wheel), signal, report);
		}
		await rm(staging, { recursive: true, force: true });
		for (const wheel of found) {
			if (signal?.aborted) throw new ArlError("ARL_INTERRUPTED", `interrupted while unpacking ${wheel.name}`);
			progress({ name: wheel.name, phase: "unpacking", bytes: done, totalBytes: total });
			await unpack(wheelFile(wheels, wheel), staging);
		}
		await writeFile(join(staging, STAMP), JSON.stringify(native.cudaWheels()));
		const old = `${staging}-old`;
		await rm(old, { recursive: true, force: true });
		if (await exists(libraries)) await rename(libraries, old);
		await rename(staging, libraries);
		for (const folder of [old, wheels]) await rm(folder, { recursive: true, force: true });
		return { folder: libraries, changed: true, bytes: done, from: index.shown };
	} catch (thrown) {
		await rm(staging, { recursive: true, force: true }).catch(() => {});
		throw toArlError(thrown);
	} finally {
		await index.close();
	}
}

/** Removes the libraries and what an installation has left. Returns the folders and their bytes. */
export async function removeLibraries(native: Core): Promise<{ folders: string[]; bytes: number }> {
	const { libraries, wheels, staging } = places(native);
	const folders: string[] = [];
	let bytes = 0;
	for (const folder of [libraries, wheels, staging, `${staging}-old`]) {
		if (!(await exists(folder))) continue;
		bytes += await bytesBelow(folder);
		await rm(folder, { recursive: true, force: true }).catch((thrown: unknown) => {
			throw toArlError(thrown);
		});
		folders.push(folder);
	}
	return { folders, bytes };
}

async function bytesBelow(folder: string): Promise<number> {
	let bytes = 0;
	for (const entry of await readdir(folder, { withFileTypes: true })) {
		const path = join(folder, entry.name);
		if (entry.isDirectory()) bytes += await bytesBelow(path);
		else if (entry.isFile()) bytes += (await stat(path)).size;
	}
	return bytes;
}

const wheelFile = (folder: string, { name, sha256 }: Wheel) => join(folder, `${name}-${sha256.slice(0, 16)}.whl`);

/** Fetches a wheel unless it is there. Returns its bytes. */
async function fetchWheel(
	index: PythonIndex,
	wheel: FoundWheel,
	path: string,
	signal: AbortSignal | null,
	report: (bytes: number) => void,
): Promise<number> {
	if (!(await exists(path))) {
		await fetchFile(
			{
				name: wheel.file,
				path,
				size: wheel.size,
				digest: { kind: "sha256", hex: wheel.sha256 },
				open: (offset) => index.open(wheel, offset),
				broken: (thrown) => index.broken(wheel, thrown),
				roomHint: ROOM_HINT,
			},
			{ signal, progress: report },
		);
	}
	return (await stat(path)).size;
}

const ROOM_HINT = "Free some space, or set ARL_CACHE to a folder on another disk.";

async function checkRoom(folder: string, found: readonly FoundWheel[]): Promise<void> {
	const { bavail, bsize } = await statfs(folder);
	const free = bavail * bsize;
	let needed = 0;
	for (const wheel of found) {
		const isThere = await exists(wheelFile(folder, wheel));
		needed += (wheel.size ?? 0) * (isThere ? UNPACKED : UNPACKED + 1);
	}
	if (needed <= free) return;
	const gigabytes = (bytes: number) => `${(bytes / 1e9).toFixed(1)} GB`;
	const message = `NVIDIA's libraries need about ${gigabytes(needed)} of ${dirname(folder)}, and ${gigabytes(free)} are free`;
	throw new ArlError("ARL_IO", message, ROOM_HINT);
}

/** What of a wheel is unpacked: shared libraries. Headers serve compilers alone. */
const LIBRARY = /^nvidia\/[\w.-]+\/lib\/[\w.-]+$/;

/** Unpacks the libraries of a wheel, which is a zip file, below `folder`. */
async function unpack(wheel: string, folder: string): Promise<void> {
	// Loaded only by an installation.
	const { openPromise } = await import("yauzl");
	const zip = await openPromise(wheel);
	try {
		for await (const entry of zip.eachEntry()) {
			if (!LIBRARY.test(entry.fileName)) continue;
			const path = join(folder, entry.fileName);
			await makeFolder(dirname(path));
			await pipeline(await zip.openReadStreamPromise(entry), createWriteStream(path, { mode: 0o755 }));
		}
	} finally {
		zip.close();
	}
}
