/** Folders are created with their parents, or refused at once. */
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { makeFolder } from "../src/disk/folders.js";
import { temporaryFolder } from "./support/folder.js";

const folder = temporaryFolder();
const module = fileURLToPath(new URL("../dist/disk/folders.js", import.meta.url));

describe("makeFolder", () => {
	it("creates what is missing, and returns the topmost folder that it created", async () => {
		const top = join(folder, "a");
		expect(await makeFolder(join(top, "b", "c"))).toBe(top);
		expect(existsSync(join(top, "b", "c"))).toBe(true);
		expect(await makeFolder(join(top, "b", "c"))).toBeUndefined();
		expect(await makeFolder(join(top, "b", "d"))).toBe(join(top, "b", "d"));
	});

	it("has the same result where several ask at once", async () => {
		const path = join(folder, "x", "y", "z");
		const tops = await Promise.all(Array.from({ length: 8 }, () => makeFolder(path)));
		expect(tops).toContain(join(folder, "x"));
		expect(existsSync(path)).toBe(true);
	});

	it("refuses a path with a file in it, and a link that leads nowhere", async () => {
		const file = join(folder, "file");
		writeFileSync(file, "");
		await expect(makeFolder(file)).rejects.toMatchObject({ code: "EEXIST" });
		await expect(makeFolder(join(file, "inner"))).rejects.toMatchObject({ code: "ENOTDIR" });
		const link = join(folder, "link");
		symlinkSync(join(folder, "gone"), link);
		await expect(makeFolder(link)).rejects.toMatchObject({ code: "EEXIST" });
		rmSync(link);
	});

	it.runIf(process.platform === "linux")("refuses what the system refuses, and does not try for ever", async () => {
		await expect(makeFolder("/proc/out/inner")).rejects.toMatchObject({ code: "ENOENT" });
	});

	it("comes to an end where the working directory is gone", () => {
		const place = mkdtempSync(join(folder, "gone-"));
		const script = (remove: boolean) => `
			const { makeFolder } = await import(${JSON.stringify(module)});
			if (${remove}) (await import("node:fs")).rmSync(process.cwd(), { recursive: true });
			await makeFolder("out/checkpoint-1").catch((error) => console.log(error.code));
			console.log("ended");`;
		const run = (remove: boolean) =>
			spawnSync(process.execPath, ["--input-type=module", "-e", script(remove)], {
				cwd: place,
				encoding: "utf8",
				timeout: 20_000,
			});
		expect(run(false).stdout).toBe("ended\n");
		expect(existsSync(join(place, "out", "checkpoint-1"))).toBe(true);
		expect(run(true).stdout).toMatch(/ended\n$/);
	});
});
