/** Folders are created with their parents, or refused at once. */
import { existsSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { makeFolder } from "../src/disk/folders.js";
import { temporaryFolder } from "./support/folder.js";

const folder = temporaryFolder();

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
});
