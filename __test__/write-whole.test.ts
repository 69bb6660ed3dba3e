import { existsSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { PARTIAL, syncPath, writeWhole } from "../src/disk/write-whole.js";
import { ArlError, toArlError } from "../src/errors.js";
import { errorOf, temporaryFolder } from "./support/folder.js";

const root = temporaryFolder();
const fresh = () => mkdtempSync(join(root, "case-"));

describe("a file that is written whole", () => {
	it("has its name only when all of it is written, and what the writer gives is given back", async () => {
		const path = join(fresh(), "rows.jsonl");
		const rows = await writeWhole(path, async (partial) => {
			await writeFile(partial, "one\n");
			expect(existsSync(path)).toBe(false);
			await writeFile(partial, "two\n", { flag: "a" });
			return 2;
		});
		expect(rows).toBe(2);
		expect(readFileSync(path, "utf8")).toBe("one\ntwo\n");
		expect(existsSync(`${path}${PARTIAL}`)).toBe(false);
	});

	it("takes the place of what a killed writer left", async () => {
		const path = join(fresh(), "rows.jsonl");
		writeFileSync(`${path}${PARTIAL}`, "left behind, and longer than what comes");
		await writeWhole(path, (partial) => writeFile(partial, "whole"));
		expect(readFileSync(path, "utf8")).toBe("whole");
		expect(existsSync(`${path}${PARTIAL}`)).toBe(false);
	});

	it("leaves what was there and nothing else when writing fails, and the error is that of the writer", async () => {
		const folder = fresh();
		const path = join(folder, "rows.jsonl");
		writeFileSync(path, "mine");
		const failure = new ArlError("ARL_DATA", "row 3 is none");
		const fails = writeWhole(path, async (partial) => {
			await writeFile(partial, "half");
			throw failure;
		});
		expect(await errorOf(fails)).toBe(failure);
		expect(readdirSync(folder)).toEqual(["rows.jsonl"]);
		expect(readFileSync(path, "utf8")).toBe("mine");
	});

	it("fails with the path where it cannot be made", async () => {
		const path = join(fresh(), "missing", "rows.jsonl");
		const error = await errorOf(writeWhole(path, (partial) => writeFile(partial, "x")));
		expect(error.code).toBe("ARL_IO");
		expect(error.message).toContain(path);
	});
});

describe("a path that is forced to disk", () => {
	it("is a file or a folder; on Windows a file that is opened for writing, and no folder", async () => {
		const folder = fresh();
		const path = join(folder, "rows.jsonl");
		writeFileSync(path, "one\n");
		for (const platform of ["linux", "darwin", "win32"] as const) {
			await syncPath(path, platform);
			await syncPath(folder, platform);
			expect(
				await errorOf(syncPath(join(folder, "missing"), platform).catch((error) => Promise.reject(toArlError(error)))),
			).toMatchObject({
				code: "ARL_IO",
			});
		}
		expect(readFileSync(path, "utf8")).toBe("one\n");
	});
});
