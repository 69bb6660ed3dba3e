/** What the commands of `arl runs` share: runs from the folders that a user names. */
import { existsSync } from "node:fs";
import { ArlError } from "../errors.js";
import { findRuns } from "../report/runs/find-runs.js";
import { isRun, RunReader } from "../report/runs/read-run.js";

/** The folders of the runs in `folders` and below them. */
export function runFolders(folders: readonly string[]): string[] {
	return folders.flatMap((folder) => findRuns(existing(folder)));
}

/** The same runs, read. */
export function runsIn(folders: readonly string[]): RunReader[] {
	return runFolders(folders).map(readRun);
}

/**
 * The run in `folder`, read.
 *
 * @throws ArlError `ARL_USAGE` if there is none.
 */
export function runAt(folder: string): RunReader {
	if (!isRun(existing(folder))) {
		throw new ArlError("ARL_USAGE", `${folder} is not the output_dir of a run`, "`arl runs ls` lists runs.");
	}
	return readRun(folder);
}

function existing(folder: string): string {
	if (existsSync(folder)) return folder;
	throw new ArlError(
		"ARL_USAGE",
		`${folder} does not exist`,
		"Name the output_dir of a run, or a folder with runs in it.",
	);
}

function readRun(folder: string): RunReader {
	const run = new RunReader(folder);
	run.update();
	return run;
}
