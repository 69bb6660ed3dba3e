/**
 * What a run replaces: an earlier run or a model in its `output_dir`, or the later checkpoints of a branch that it abandons.
 * All of it is set aside in a folder, removed as soon as the new run has a complete checkpoint or model, and restored if the run
 * ends before that; if its process was killed, the next start in this folder restores it.
 *
 * `.old-run.partial`: files are being moved there, or back. `.old-run`: all have been moved, and the new run is in progress.
 * `.old-run.removed`: the new run has a checkpoint or model. Each state begins with one rename.
 */
import { copyFile, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { exists, makeFolder } from "../../disk/folders.js";
import { PARTIAL, syncPath } from "../../disk/write-whole.js";
import { ArlError, toArlError } from "../../errors.js";
import { LISTS_FOLDER as ROW_LISTS } from "../../mongo/list-file.js";
import { METRICS_FILE } from "../../report/metrics.js";
import { RECORD_FILE, REPORT_FILE } from "../../report/runs/record.js";
import { SINKS_FOLDER, TENSORBOARD_FOLDER } from "../../report/sinks/outbox.js";
import { CACHE_FOLDER, RUN_FOLDER } from "../setup/options.js";
import { CHECKPOINT_NAME, listCheckpoints } from "./checkpoint.js";
import { isLink, LINKS } from "./links.js";
import { isModelFile, isPublished, MODEL_LIST, publishedFiles, removePublished } from "./publish.js";

const ASIDE = ".old-run";
const MOVING = ".old-run.partial";
const REMOVED = ".old-run.removed";
const RECORD = "old-run.json";

/** What is set aside, and how a complete checkpoint of the new run is recognized. */
interface Plan {
	/** Paths within `output_dir`. */
	names: string[];
	/** The step after which the new run resumes: its checkpoints are later. Null: nothing of the old run stays in place. */
	after: number | null;
}

/** Everything in `output_dir` that belongs to a run or to a model, of whatever program. */
export async function namesOfOldRun(outputDir: string): Promise<string[]> {
	const published = new Set(await publishedFiles(outputDir));
	const own = (name: string) =>
		CHECKPOINT_NAME.test(name) || published.has(name) || isModelFile(name) || OTHERS.includes(name);
	const names = (await readdir(outputDir).catch(() => [])).filter(own);
	return [...names.sort(), ...(await linksIn(outputDir)), ...(await runCaches(outputDir))];
}

/** What a run reports of itself: files, what is left of one that was being written, and what sinks keep. */
const REPORTS = [METRICS_FILE, RECORD_FILE, REPORT_FILE];
const REPORT_PARTIALS = [RECORD_FILE, REPORT_FILE].map((name) => `${name}${PARTIAL}`);
const OF_A_RUN = [...REPORTS, ...REPORT_PARTIALS, SINKS_FOLDER, TENSORBOARD_FOLDER, ROW_LISTS];
const OTHERS = [...OF_A_RUN, MODEL_LIST];

async function linksIn(outputDir: string): Promise<string[]> {
	const found = await Promise.all(LINKS.map((name) => isLink(outputDir, name)));
	return LINKS.filter((_, i) => found[i]);
}

/** The cache folders of runs on user-supplied data sets, if the cache belongs to this `output_dir`. */
async function runCaches(outputDir: string): Promise<string[]> {
	const names = await readdir(join(outputDir, CACHE_FOLDER)).catch(() => []);
	return names.filter((name) => name.startsWith(RUN_FOLDER)).map((name) => join(CACHE_FOLDER, name));
}

/**
 * Sets aside all of an earlier run or model, except the cache folder of the new run, whose id is `kept`. Returns what was set
 * aside, for people; null: nothing.
 */
export async function setOldRunAside(outputDir: string, kept: string | null): Promise<string | null> {
	const own = kept === null ? null : join(CACHE_FOLDER, `${RUN_FOLDER}${kept}`);
	const names = (await namesOfOldRun(outputDir)).filter((name) => name !== own);
	return await setAside(outputDir, { names, after: null });
}

/** Sets aside the checkpoints after the step from which a run resumes. Returns them, for people; null: there are none. */
export async function setBranchAside(outputDir: string, after: number): Promise<string | null> {
	const later = (await listCheckpoints(outputDir)).filter(({ step }) => step > after);
	if (later.length === 0) return null;
	const names = [...later.map(({ step }) => `checkpoint-${step}`), ...(await linksIn(outputDir))];
	return await setAside(outputDir, { names, after });
}

async function setAside(outputDir: string, plan: Plan): Promise<string | null> {
	if (plan.names.length === 0) return null;
	const moving = join(outputDir, MOVING);
	try {
		await makeFolder(moving);
		await writeFile(join(moving, RECORD), `${JSON.stringify({ version: 1, after: plan.after })}\n`);
		await syncPath(join(moving, RECORD));
		// A resumed run cuts off the lines after the checkpoint, and replaces the reports; restoring the branch restores them.
		for (const name of plan.after === null ? [] : REPORTS) {
			if (await exists(join(outputDir, name))) await copyFile(join(outputDir, name), join(moving, name));
		}
		for (const name of plan.names) await move(join(outputDir, name), join(moving, name));
		await syncPath(moving);
		await rename(moving, join(outputDir, ASIDE));
		await syncPath(outputDir);
	} catch (error) {
		const failure = toArlError(error);
		await putBack(outputDir).catch((second: unknown) => failure.suppressed.push(toArlError(second)));
		throw failure;
	}
	const shown = plan.names.filter((name) => !name.startsWith(".") && !LINKS.includes(name));
	return `${shown.slice(0, 4).join(", ")}${shown.length > 4 ? ` and ${shown.length - 4} more` : ""}`;
}

async function move(from: string, to: string): Promise<void> {
	await makeFolder(dirname(to));
	await rename(from, to);
}

/** Removes what was set aside, because the new run has replaced it. Returns the folder; null: nothing was set aside. */
export async function removeOldRun(outputDir: string): Promise<string | null> {
	const [aside, removed] = [join(outputDir, ASIDE), join(outputDir, REMOVED)];
	try {
		if (!(await exists(aside))) return null;
		await rm(removed, { recursive: true, force: true });
		await rename(aside, removed);
		await rm(removed, { recursive: true, force: true });
		return aside;
	} catch (error) {
		throw toArlError(error);
	}
}

/**
 * Decides about an old run when the new one has ended or was killed: removes the old one if the new one left a complete
 * checkpoint or model, and restores it otherwise. Returns what was restored, for people; null: nothing.
 *
 * @throws ArlError `ARL_STATE` if the folder is not as this program leaves it.
 */
export async function settleOldRun(outputDir: string): Promise<string | null> {
	const [aside, moving] = [join(outputDir, ASIDE), join(outputDir, MOVING)];
	try {
		await rm(join(outputDir, REMOVED), { recursive: true, force: true });
		if (!(await exists(moving))) {
			if (!(await exists(aside))) return null;
			const after = await readRecord(aside);
			if (await hasResult(outputDir, after)) {
				await removeOldRun(outputDir);
				return null;
			}
			if (after === null) await removeNewRun(outputDir);
			await rename(aside, moving);
		}
		return (await putBack(outputDir)) ? `What was in ${outputDir} before is restored.` : null;
	} catch (error) {
		throw toArlError(error);
	}
}

/** Whether the new run left a complete checkpoint or model. */
async function hasResult(outputDir: string, after: number | null): Promise<boolean> {
	const checkpoints = await listCheckpoints(outputDir);
	if (checkpoints.some(({ step }) => step > (after ?? -1))) return true;
	return after === null && (await isPublished(outputDir));
}

/** Removes what a run without a result left behind. */
async function removeNewRun(outputDir: string): Promise<void> {
	await removePublished(outputDir);
	for (const name of [...OF_A_RUN, ...(await linksIn(outputDir)), ...(await runCaches(outputDir))]) {
		await rm(join(outputDir, name), { recursive: true, force: true });
	}
}

/** Moves everything back. False: nothing was there. */
async function putBack(outputDir: string): Promise<boolean> {
	const moving = join(outputDir, MOVING);
	const names = (await readdir(moving).catch(() => [])).filter((name) => name !== RECORD && name !== CACHE_FOLDER);
	const caches = await runCaches(moving);
	if (names.length + caches.length > 0) await readRecord(moving);
	for (const name of [...names, ...caches]) await move(join(moving, name), join(outputDir, name));
	await rm(moving, { recursive: true, force: true });
	await syncPath(outputDir);
	return names.length + caches.length > 0;
}

/** The step after which the new run began; null: it began with the first. Throws for a folder of other origin. */
async function readRecord(folder: string): Promise<number | null> {
	try {
		const { version, after } = JSON.parse(await readFile(join(folder, RECORD), "utf8"));
		if (version === 1 && (after === null || typeof after === "number")) return after;
	} catch {
		// Reported below, like a record of another shape.
	}
	throw new ArlError(
		"ARL_STATE",
		`${folder}: ${RECORD} cannot be read, so what was set aside there is unknown`,
		"Move the content of the folder back to where it was, and remove the folder.",
	);
}
