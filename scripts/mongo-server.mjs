// The MongoDB-compatible server of the tests and of `npm run mongo`: finds it, installs it, starts it. It is a program of
// its own (secantusd-rs, GPL), built once into the build cache; nothing of it is linked or shipped.

import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { cache } from "./setup.mjs";

const version = "0.5.3-beta.196";
const home = join(cache, "secantusd", version);
const binary = join(home, "bin", process.platform === "win32" ? "secantusd-rs.exe" : "secantusd-rs");

/** Where the server's program is, or null where it is not installed. */
export function findServer() {
	return existsSync(binary) ? binary : null;
}

/** The package's own profile optimizes across crates and for speed, which takes time that a server for tests need not cost. */
const QUICK_BUILD = {
	CARGO_PROFILE_RELEASE_LTO: "off",
	CARGO_PROFILE_RELEASE_CODEGEN_UNITS: "16",
	CARGO_PROFILE_RELEASE_OPT_LEVEL: "0",
};

/** What CMake reads first in the build of the storage engine, which is in C: WiredTiger's own option, at its lowest level too. */
const QUICK_TOOLCHAIN = 'if(NOT CMAKE_HOST_WIN32)\n  set(CC_OPTIMIZE_LEVEL "-O0" CACHE STRING "")\nendif()\n';

function runs(command) {
	const result = spawnSync(command, ["--version"], { stdio: "ignore" });
	return result.error === undefined && result.status === 0;
}

/**
 * Builds the server if it is not there. Resolves to null when it is there at the end, else to why it is not. `quiet` shows
 * cargo's errors alone, for a build next to other output.
 */
export async function installServer({ quiet = false } = {}) {
	if (findServer() !== null) return null;
	const missing = ["cargo", "cmake", process.env.CC ?? "cc"].filter((command) => !runs(command));
	if (missing.length > 0) return `building secantusd-rs ${version} needs ${missing.join(", ")}, which is missing here`;
	console.error(`arl: building the MongoDB server for tests, secantusd-rs ${version} (about five minutes, once)`);
	// A target folder of its own: a build that was broken off goes on where it was.
	const target = join(cache, "secantusd", "target");
	mkdirSync(home, { recursive: true });
	mkdirSync(target, { recursive: true });
	const toolchain = join(target, "quick.cmake");
	writeFileSync(toolchain, QUICK_TOOLCHAIN);
	const args = ["install", "secantus-mdb", "--version", version, "--locked", "--ignore-rust-version", "--root", home];
	const child = spawn("cargo", quiet ? [...args, "--quiet"] : args, {
		cwd: home,
		stdio: ["ignore", 2, 2],
		env: { ...process.env, ...QUICK_BUILD, CMAKE_TOOLCHAIN_FILE: toolchain, CARGO_TARGET_DIR: target },
	});
	const stop = () => child.kill();
	process.once("exit", stop);
	const built = await new Promise((resolve) => {
		child.on("error", () => resolve(false));
		child.on("close", (code) => resolve(code === 0));
	});
	process.off("exit", stop);
	if (!built || findServer() === null) {
		return `secantusd-rs ${version} could not be built (is the crate registry reachable?); cargo's output is above`;
	}
	rmSync(target, { recursive: true, force: true });
	return null;
}

/**
 * Starts the server on a folder of data, and returns the process and its port once it listens. Port 0 lets the system
 * choose one. A write that was acknowledged is on the disk, also after a kill -9.
 */
export function startServer({ dir, port = 0, args = [] }) {
	mkdirSync(dir, { recursive: true });
	const child = spawn(
		binary,
		[
			"--port",
			String(port),
			"--storage-path",
			dir,
			"--sync-on-commit",
			"--cache-size",
			"256M",
			"--log-file-max",
			"16MB",
			"--log-level",
			"WARNING",
			...args,
		],
		// The server puts results together in memory that it has not used before. In huge pages the kernel clears several
		// times as much of it as is used: most of the time of a first scan (docs/performance.md).
		{ cwd: dir, stdio: ["ignore", "pipe", "pipe"], env: { MIMALLOC_ALLOW_THP: "0", ...process.env } },
	);
	return new Promise((resolve, reject) => {
		let text = "";
		const read = (chunk) => {
			// Read on after the start, so that the server never waits for a full pipe.
			if (text === null) return;
			text += chunk;
			const found = /listening on [^\s:]+:(\d+)/.exec(text);
			if (found === null) return;
			text = null;
			resolve({ child, port: Number(found[1]) });
		};
		child.stdout.setEncoding("utf8").on("data", read);
		child.stderr.setEncoding("utf8").on("data", read);
		child.on("error", reject);
		child.on("exit", (code, signal) => {
			if (text !== null) reject(new Error(`secantusd-rs ended (${code ?? signal}) before it listened: ${text.trim()}`));
		});
	});
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	const reason = await installServer();
	if (reason !== null) {
		console.error(`SKIPPED: tests that need a MongoDB server: ${reason}`);
		process.exitCode = 1;
	} else console.log(findServer());
}
