import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readdirSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { Scratch, userCacheDir } from "../src/data/sources/scratch.js";
import { ADDON_LOADER, loadNative } from "../src/native.js";
import { temporaryFolder } from "./support/folder.js";
import { arl, flags, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

/** A process that has a folder below `parent` with a file in it, and lives until it is killed. */
async function holder(parent: string) {
	const program = `
		const { ScratchFolder } = require(${JSON.stringify(ADDON_LOADER)});
		const folder = ScratchFolder.create(${JSON.stringify(parent)});
		require("node:fs").writeFileSync(folder.path + "/rows", "text");
		process.stdout.write(folder.path);
		setInterval(() => folder.path, 1000);`;
	const child = spawn(process.execPath, ["-e", program], { stdio: ["ignore", "pipe", "inherit"] });
	const [path] = await once(child.stdout, "data");
	const kill = async () => {
		child.kill("SIGKILL");
		await once(child, "exit");
	};
	return { path: String(path), kill };
}

describe("temporary files", () => {
	it("of a process that was killed are removed by the next one, and of one that runs they stay", async () => {
		const parent = mkdtempSync(join(folder, "parent-"));
		const [first, second] = [await holder(parent), await holder(parent)];
		await first.kill();
		expect(existsSync(join(first.path, "rows"))).toBe(true);
		const scratch = new Scratch(loadNative(), parent);
		const own = scratch.path();
		expect(existsSync(first.path)).toBe(false);
		expect(existsSync(join(second.path, "rows"))).toBe(true);
		scratch.close();
		await second.kill();
		expect(existsSync(own)).toBe(false);
	});

	it("need no folder before the first is written, and go with all that is in it", () => {
		const parent = mkdtempSync(join(folder, "parent-"));
		const scratch = new Scratch(loadNative(), parent);
		expect(readdirSync(parent)).toEqual([]);
		const files = [scratch.newFile(), scratch.newFile()];
		expect(new Set(files).size).toBe(2);
		for (const file of files) writeFileSync(file, "text");
		scratch.close();
		scratch.close();
		expect(readdirSync(parent)).toEqual([]);
	});

	it("without a folder of a run go into the user's cache, not into the system's folder", () => {
		expect(userCacheDir({ XDG_CACHE_HOME: "/cache" })).toBe(join("/cache", "arl"));
		expect(userCacheDir({ XDG_CACHE_HOME: "" })).toBe(join(homedir(), ".cache", "arl"));
	});

	it("of a run go into its cache_dir, else below output_dir, and are gone at its end", {
		timeout: 60_000,
	}, async () => {
		const place = tinyPlace(folder, 20);
		const packed = `${place.file}.gz`;
		writeFileSync(packed, gzipSync(await import("node:fs").then(({ readFileSync }) => readFileSync(place.file))));
		// Neither can be made, so that whatever goes there fails.
		const nowhere = join(place.file, "nowhere");
		const options = {
			model_name_or_path: place.model,
			train_file: packed,
			output_dir: place.out,
			init_from_config: true,
		};
		const words = ["train", ...flags({ ...options, max_steps: 1, save_strategy: "no" })];
		const ended = await arl(words, undefined, undefined, { TMPDIR: nowhere, XDG_CACHE_HOME: nowhere });
		expect(ended.code, ended.stderr).toBe(0);
		const left = readdirSync(join(place.out, ".cache"), { recursive: true }).map(String);
		expect(left.filter((name) => name.includes("scratch"))).toEqual([]);
	});
});
