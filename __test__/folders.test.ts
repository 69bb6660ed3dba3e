import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";

const module = fileURLToPath(new URL("../dist/disk/folders.js", import.meta.url));

test("a folder is made with those above it, and where the working directory is gone, that comes to an end", () => {
	const folder = mkdtempSync(join(tmpdir(), "arl-folders-"));
	const script = (remove: boolean) => `
		const { makeFolder } = await import(${JSON.stringify(module)});
		if (${remove}) (await import("node:fs")).rmSync(process.cwd(), { recursive: true });
		await makeFolder("out/checkpoint-1").catch((error) => console.log(error.code));
		console.log("ended");`;
	const run = (remove: boolean) =>
		spawnSync(process.execPath, ["--input-type=module", "-e", script(remove)], {
			cwd: folder,
			encoding: "utf8",
			timeout: 20_000,
		});
	expect(run(false).stdout).toBe("ended\n");
	expect(existsSync(join(folder, "out", "checkpoint-1"))).toBe(true);
	expect(run(true).stdout).toMatch(/ended\n$/);
	rmSync(folder, { recursive: true, force: true });
});
