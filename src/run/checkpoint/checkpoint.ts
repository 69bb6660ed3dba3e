/**
 * Checkpoints on disk: `checkpoint-N/` is a model in Hugging Face's layout, with the state to resume from in `arl/`.
 * It is written under another name, forced to the disk, checked and renamed, so that an existing one is always complete.
 */
import { lstat, readdir, readFile, realpath, rename, rm, stat, writeFile } from "node:fs/promises";
import { join, relative, sep } from "node:path";
import { exists, makeFolder } from "../../disk/folders.js";
import { hashFile } from "../../disk/hash-file.js";
import { syncPath } from "../../disk/write-whole.js";
import { ArlError, toArlError } from "../../errors.js";
import type { NativeEngine } from "../../native.js";
import { parseState, type TrainerState } from "./state.js";

const STATE_FILE = "arl/trainer_state.json";
/** The file by which a checkpoint of this program is recognized. */
export const MANIFEST_FILE = "arl/manifest.json";

/** Sizes and hashes of every other file of the checkpoint, by path within it. */
interface Manifest {
	version: 1;
	step: number;
	files: Record<string, { bytes: number; sha256: string }>;
}

/** A checkpoint that is complete. */
export interface CheckpointFolder {
	step: number;
	path: string;
}

async function filesOf(folder: string): Promise<string[]> {
	const entries = await readdir(folder, { withFileTypes: true, recursive: true });
	return (
		entries
			.filter((entry) => entry.isFile())
			// The names in a manifest are the same on every system.
			.map((entry) => relative(folder, join(entry.parentPath, entry.name)).split(sep).join("/"))
			.sort()
	);
}

/** The names of checkpoints, those of other programs included. */
export const CHECKPOINT_NAME = /^checkpoint-(\d+)$/;

/** Checkpoints of a run that have a manifest, the oldest first. */
export async function listCheckpoints(outputDir: string): Promise<CheckpointFolder[]> {
	return (await checkpointsIn(outputDir)).own;
}

/** Folders named like a checkpoint, the oldest first: those with a manifest, and those of other programs. */
export async function checkpointsIn(
	outputDir: string,
): Promise<{ own: CheckpointFolder[]; foreign: CheckpointFolder[] }> {
	const own: CheckpointFolder[] = [];
	const foreign: CheckpointFolder[] = [];
	for (const name of await readdir(outputDir).catch(() => [])) {
		const step = CHECKPOINT_NAME.exec(name)?.[1];
		if (step === undefined) continue;
		const path = join(outputDir, name);
		((await exists(join(path, MANIFEST_FILE))) ? own : foreign).push({ step: Number(step), path });
	}
	for (const found of [own, foreign]) found.sort((a, b) => a.step - b.step);
	return { own, foreign };
}

const UNFINISHED = /^\.checkpoint-(\d+)\.(partial|old|removed)$/;

/**
 * Removes what a killed save or removal left behind, and restores a checkpoint that was about to be replaced. Returns the
 * removed paths.
 */
export async function removeUnfinished(outputDir: string): Promise<string[]> {
	const removed: string[] = [];
	for (const name of await readdir(outputDir).catch(() => [])) {
		const match = UNFINISHED.exec(name);
		if (!match) continue;
		const path = join(outputDir, name);
		const place = join(outputDir, `checkpoint-${match[1]}`);
		if (match[2] === "old" && !(await exists(place))) {
			await rename(path, place);
			continue;
		}
		await rm(path, { recursive: true, force: true });
		removed.push(path);
	}
	return removed;
}

/** Removes a checkpoint. It is renamed first, so that a part of it is never mistaken for a checkpoint. */
export async function removeCheckpoint(checkpoint: CheckpointFolder): Promise<void> {
	const aside = join(checkpoint.path, "..", `.checkpoint-${checkpoint.step}.removed`);
	await rm(aside, { recursive: true, force: true });
	await rename(checkpoint.path, aside);
	await rm(aside, { recursive: true, force: true });
}

/** What a save needs of an engine. */
export type SavingEngine = Pick<NativeEngine, "exportModel" | "saveState">;

/**
 * Writes `checkpoint-N`. If anything fails, the partial folder is removed and existing checkpoints stay as they are.
 *
 * @throws ArlError `ARL_IO` with the path and the last complete checkpoint.
 */
export async function saveCheckpoint(
	engine: SavingEngine,
	outputDir: string,
	state: TrainerState,
): Promise<{ path: string; bytes: number }> {
	const place = join(outputDir, `checkpoint-${state.step}`);
	const partial = join(outputDir, `.checkpoint-${state.step}.partial`);
	try {
		await rm(partial, { recursive: true, force: true });
		await makeFolder(join(partial, "arl"));
		await engine.exportModel(partial);
		await engine.saveState(join(partial, "arl"));
		await writeFile(join(partial, STATE_FILE), `${JSON.stringify(state, null, 1)}\n`);
		const bytes = await seal(partial, state.step);
		await moveIntoPlace(partial, place, join(outputDir, `.checkpoint-${state.step}.old`));
		await syncPath(outputDir);
		return { path: place, bytes };
	} catch (error) {
		await rm(partial, { recursive: true, force: true }).catch(() => {});
		throw await saveError(error, place, outputDir);
	}
}

/** Forces every file to the disk, and writes the manifest. Returns the bytes of all files. */
async function seal(folder: string, step: number): Promise<number> {
	const manifest: Manifest = { version: 1, step, files: {} };
	let bytes = 0;
	const names = await filesOf(folder);
	if (!names.some((name) => !name.startsWith("arl/") && name.endsWith(".safetensors"))) {
		throw new ArlError("ARL_INTERNAL", `${folder}: the engine wrote no weights`);
	}
	for (const name of names) {
		const path = join(folder, name);
		await syncPath(path);
		const size = (await stat(path)).size;
		manifest.files[name] = { bytes: size, sha256: await hashFile(path) };
		bytes += size;
	}
	const path = join(folder, MANIFEST_FILE);
	await writeFile(path, `${JSON.stringify(manifest, null, 1)}\n`);
	await syncPath(path);
	await syncPath(join(folder, "arl"));
	await syncPath(folder);
	return bytes;
}

async function moveIntoPlace(partial: string, place: string, old: string): Promise<void> {
	if (await exists(place)) {
		await rm(old, { recursive: true, force: true });
		await rename(place, old);
	}
	await rename(partial, place);
	await rm(old, { recursive: true, force: true });
}

async function saveError(error: unknown, place: string, outputDir: string): Promise<ArlError> {
	const cause = toArlError(error);
	const last = (await listCheckpoints(outputDir)).at(-1);
	const left = last ? `The last checkpoint is ${last.path}; resume from it.` : "There is no checkpoint yet.";
	const message = `${place}: the checkpoint could not be saved: ${cause.message}`;
	return new ArlError(cause.code, message, `${cause.hint} ${left}`.trim(), { cause });
}

/**
 * Checks every file of a checkpoint against the manifest, and reads its state.
 *
 * @throws ArlError `ARL_STATE` if a file is missing, or not as it was written.
 */
export async function openCheckpoint(path: string): Promise<{ state: TrainerState; stateDir: string }> {
	const info = await stat(path).catch(() => null);
	if (info === null || !info.isDirectory()) {
		throw new ArlError(
			"ARL_STATE",
			`resume_from_checkpoint: ${path} ${info === null ? "does not exist" : "is not a folder"}`,
			"Give a checkpoint-N folder of a run, or latest.",
		);
	}
	const manifest = await readManifest(path);
	for (const [name, written] of Object.entries(manifest.files)) {
		const damage = await damageOf(join(path, name), written);
		if (damage !== null)
			throw new ArlError("ARL_STATE", `${join(path, name)}: ${damage}`, "Resume from another checkpoint.");
	}
	const state = parseState(await readFile(join(path, STATE_FILE), "utf8"), join(path, STATE_FILE));
	return { state, stateDir: join(path, "arl") };
}

/** What is wrong with a file; null: it is as it was written. */
async function damageOf(file: string, { bytes, sha256 }: { bytes: number; sha256: string }): Promise<string | null> {
	const size = (await stat(file).catch(() => null))?.size;
	if (size === undefined) return "it is missing";
	if (size !== bytes) return `it has ${size} bytes, and ${bytes} were written`;
	return (await hashFile(file)) === sha256 ? null : "its content is not what was written";
}

async function readManifest(path: string): Promise<Manifest> {
	const file = join(path, MANIFEST_FILE);
	const text = await readFile(file, "utf8").catch((error: NodeJS.ErrnoException) => {
		if (error.code !== "ENOENT") throw toArlError(error);
		throw new ArlError(
			"ARL_STATE",
			`${path}: no checkpoint of this program: ${MANIFEST_FILE} is missing`,
			"A plain model is a start, not a checkpoint: give it as model_name_or_path.",
		);
	});
	try {
		const manifest = JSON.parse(text) as Manifest;
		if (manifest.version === 1 && typeof manifest.files === "object" && STATE_FILE in manifest.files) return manifest;
	} catch {
		// Reported below, like a manifest of another shape.
	}
	throw new ArlError("ARL_STATE", `${file}: the manifest cannot be read`, "Resume from another checkpoint.");
}

/** The checkpoint that a run resumes from. */
export interface Resumable {
	path: string;
	state: TrainerState;
	stateDir: string;
	/** Errors of newer checkpoints, which are damaged. */
	damaged: string[];
}

/** Whether the path itself is a symbolic link to something. */
async function isLinkTo(path: string): Promise<boolean> {
	return (await lstat(path).catch(() => null))?.isSymbolicLink() === true && (await exists(path));
}

/** Opens the checkpoint `wanted`. `latest`: the newest complete one in `outputDir`; null if it has none. */
export async function findCheckpoint(wanted: string, outputDir: string): Promise<Resumable | null> {
	if (wanted !== "latest") {
		// The links `best` and `latest` may point elsewhere before the run ends.
		const path = (await isLinkTo(wanted)) ? await realpath(wanted) : wanted;
		return { path, ...(await openCheckpoint(path)), damaged: [] };
	}
	const damaged: string[] = [];
	for (const { path } of (await listCheckpoints(outputDir)).reverse()) {
		try {
			return { path, ...(await openCheckpoint(path)), damaged };
		} catch (error) {
			damaged.push(toArlError(error).message);
		}
	}
	if (damaged.length > 0) {
		throw new ArlError("ARL_STATE", [`${outputDir}: no checkpoint is whole`, ...damaged].join("\n"));
	}
	return null;
}
