import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { loadConfigFile } from "../src/config/index.js";
import { temporaryFolder } from "./support/folder.js";

const folder = temporaryFolder();

function write(name: string, text: string | Buffer): string {
	const path = join(folder, name);
	writeFileSync(path, text);
	return path;
}

describe("files", () => {
	it("of all kinds give the same values", async () => {
		const paths = [
			write("a.yaml", "learning_rate: 1e-5\neval_strategy: no\ntrain_file: [a.jsonl]\n"),
			write("a.json", '{"$schema": "x", "learning_rate": 1e-5, "eval_strategy": "no", "train_file": ["a.jsonl"]}'),
			write(
				"arl.config.ts",
				'import { defineConfig } from "arl";\nconst rate: number = 1e-5;\nexport default defineConfig({ learning_rate: rate, eval_strategy: "no", train_file: ["a.jsonl"] } as never);\n',
			),
			write(
				"b.mjs",
				'export default async () => ({ learning_rate: 1e-5, eval_strategy: "no", train_file: ["a.jsonl"] });\n',
			),
		];
		for (const path of paths) {
			const values = Object.fromEntries((await loadConfigFile(path)).values);
			expect(values, path).toEqual({ learning_rate: 1e-5, eval_strategy: "no", train_file: ["a.jsonl"] });
		}
	});

	it.each([
		["twice.yaml", "seed: 1\nseed: 2\n", /twice\.yaml:2:\d+: .*unique/],
		["broken.yaml", "seed: [1\n", /broken\.yaml:\d+:\d+: /],
		["list.yaml", "- a\n", /expected options by name, found a list/],
		["broken.json", '{\n"seed": 1,\n}', /broken\.json:3: not JSON/],
		["rows.jsonl", "{}", /the name is not that of a configuration file/],
		["throws.mjs", "throw new Error('no luck');", /throws\.mjs: no luck/],
		["latin.yaml", Buffer.from([0x61, 0x3a, 0x20, 0xe9]), /not text in UTF-8/],
	])("%s is refused with where it is wrong", async (name, text, message) => {
		await expect(loadConfigFile(write(name, text))).rejects.toThrow(message);
	});

	it("that are missing or folders are refused", async () => {
		await expect(loadConfigFile(join(folder, "none.yaml"))).rejects.toMatchObject({ code: "ARL_IO" });
		await expect(loadConfigFile(join(folder, "none.ts"))).rejects.toMatchObject({ code: "ARL_IO" });
	});

	it("that bite their own tail or bloat are refused", async () => {
		const bomb = [
			"a: &a [x, x]",
			"b: &b [*a, *a, *a, *a, *a]",
			"c: &c [*b, *b, *b, *b, *b]",
			"d: [*c, *c, *c, *c, *c]",
		];
		await expect(loadConfigFile(write("bomb.yaml", bomb.join("\n")))).rejects.toMatchObject({ code: "ARL_CONFIG" });
	});
});
