/** Finds the folders of runs. */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { isRun } from "./read-run.js";

/** Levels below a folder that are searched. */
const DEPTH = 3;

/** The `output_dir`s in `folder` and below it, sorted; nothing is searched inside of one. */
export function findRuns(folder: string, depth = DEPTH): string[] {
	if (isRun(folder)) return [folder];
	if (depth === 0) return [];
	return subfolders(folder).flatMap((name) => findRuns(join(folder, name), depth - 1));
}

/** The order of folders: `run-2` before `run-10`. */
export function byName(a: string, b: string): number {
	return a.localeCompare(b, "en", { numeric: true });
}

function subfolders(folder: string): string[] {
	try {
		return readdirSync(folder, { withFileTypes: true })
			.filter((entry) => entry.isDirectory() && !entry.name.startsWith(".") && entry.name !== "node_modules")
			.map(({ name }) => name)
			.sort(byName);
	} catch {
		return [];
	}
}
