// Where cargo builds: one target folder for all clones, so that packages are compiled once. Of the project's own crates a
// clone takes nothing that another clone has built there.

import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";

/** Folders of `path`, by name; none where it is not there. */
function foldersOf(path) {
	if (!existsSync(path)) return [];
	const entries = readdirSync(path, { withFileTypes: true });
	return entries.filter((entry) => entry.isDirectory()).map((entry) => entry.name);
}

/**
 * Makes the target folder `target` the clone's at `root`, and returns it.
 *
 * Cargo knows a crate by its place in the workspace, and its sources by their times: what another clone has built of
 * other sources passes for this one's if it is younger than they are. So the fingerprints of the workspace's crates go
 * when another clone built last, and cargo builds these crates again; all others stay.
 */
export function claimTarget(target, root) {
	const crates = join(root, "crates");
	// A folder that was deleted and cloned again is another clone.
	const { ino, birthtimeMs } = statSync(crates);
	const clone = `${root}\n${ino} ${birthtimeMs}\n`;
	const stamp = join(target, ".arl-clone");
	if (existsSync(stamp) && readFileSync(stamp, "utf8") === clone) return target;
	const own = new Set(foldersOf(crates));
	// target/release, and target/x86_64-unknown-linux-gnu/release.
	const places = foldersOf(target).flatMap((name) => [
		name,
		...foldersOf(join(target, name)).map((at) => join(name, at)),
	]);
	for (const place of places) {
		const fingerprints = join(target, place, ".fingerprint");
		for (const name of foldersOf(fingerprints)) {
			if (own.has(name.replace(/-[0-9a-f]{16}$/, ""))) rmSync(join(fingerprints, name), { recursive: true });
		}
	}
	mkdirSync(target, { recursive: true });
	writeFileSync(stamp, clone);
	return target;
}
