import { mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { InspectedRow } from "../src/api/inspect-row.js";
import { temporaryFolder } from "./support/folder.js";
import { arl, root } from "./support/real.js";

const folder = temporaryFolder();
const train = join(root, "assets", "train.jsonl");
const lines = readFileSync(train, "utf8").split("\n");

const inspect = (...words: string[]) =>
	arl(["inspect", "--model_name_or_path", join(root, "assets", "model"), ...words]);

function write(content: string, name = "rows.jsonl"): string {
	const path = join(mkdtempSync(join(folder, "inspect-")), name);
	writeFileSync(path, content);
	return path;
}

const chat = (content: string, extra = {}) =>
	JSON.stringify({
		messages: [
			{ role: "user", content: "?" },
			{ role: "assistant", content, ...extra },
		],
	});

describe("arl inspect", () => {
	it("marks each reply with the token that ends it, and nothing else", async () => {
		const { stdout, stderr, code } = await inspect("--train_file", train, "--row", "3");
		expect(code, stderr).toBe(0);
		const last = JSON.parse(lines[2] as string).messages.at(-1).content;
		const marked = [...stdout.matchAll(/«(.*?)»/gs)].map(([, text]) => text);
		expect(marked).toEqual([`${last}<|im_end|>`]);
		expect(stdout).toMatch(
			new RegExp(
				`^${train}:3: 142 tokens of messages, 8 trained \\(5\\.6 %\\)\n  message 2: tokens 133 to 140 \\(8\\)\n`,
			),
		);
	});

	it("keeps characters whole that are several tokens, tells weights, and shows what a terminal would obey", async () => {
		const file = write(`${chat("é 日本 😀\u001b[31m", { weight: 0.5 })}\n`);
		const { stdout } = await inspect("--train_file", file);
		expect(stdout).toContain("«é 日本 😀\\u001b[31m<|im_end|>»");
		expect(stdout).toContain(", weight 0.5\n");
		const tokens = await inspect("--train_file", file, "--tokens");
		expect(tokens.stdout).toMatch(/0\.5 0\.5 0\.5 {2}"日"\n/);
		const json: InspectedRow = JSON.parse((await inspect("--train_file", file, "--json")).stdout);
		expect(json.texts.map(({ text }) => text).join("")).toContain("é 日本 😀\u001b[31m<|im_end|>");
		expect(json.texts.flatMap(({ ids }) => ids)).toHaveLength(json.tokens);
		expect(json.texts.flatMap(({ weights }) => weights).filter((weight) => weight === 0.5)).toHaveLength(
			json.targetTokens,
		);
	});

	it("asks a data set for that row alone, reads a stream up to it, and leaves nothing behind", async () => {
		const raw = `const row = (i: number) => (${chat("NUMBER").replace('"NUMBER"', "String(i)")});\n`;
		const asked = write("", "asked");
		const log = `require("node:fs").appendFileSync(${JSON.stringify(asked)}, i + " ");`;
		const indexed = write(
			`${raw}export default { length: 1e6, get: (i: number) => { ${log} return row(i); } };`,
			"a.ts",
		);
		const stream = write(`${raw}export default function* () { for (let i = 0; ; i++) yield row(i); }`, "b.ts");
		const temporary = mkdtempSync(join(folder, "tmp-"));
		const usual = process.env.TMPDIR;
		process.env.TMPDIR = temporary;
		try {
			expect((await inspect("--dataset", indexed, "--row", "777778")).stdout).toContain("«777777<|im_end|>»");
			const order = "--train_sampling_strategy sequential --max_steps 50".split(" ");
			expect((await inspect("--dataset", stream, "--row", "301", ...order)).stdout).toContain("«300<|im_end|>»");
		} finally {
			if (usual === undefined) delete process.env.TMPDIR;
			else process.env.TMPDIR = usual;
		}
		expect(readFileSync(asked, "utf8")).toBe("777777 ");
		expect(readdirSync(temporary)).toEqual([]);
	});

	it("names a row that cannot be used, and one that is not there", async () => {
		const file = write(`${chat("a")}\nnope\n`);
		const bad = await inspect("--train_file", file, "--row", "2");
		expect(bad.code).toBe(3);
		expect(bad.stderr).toContain(`${file}:2: not json`);
		const missing = await inspect("--train_file", file, "--row", "3");
		expect(missing.code).toBe(2);
		expect(missing.stderr).toContain(`row 3 was asked for, and ${file} has 2`);
		expect((await inspect("--train_file", file, "--row", "-1")).code).toBe(2);
		expect((await inspect("--help")).stdout).toContain("--row N");
	});
});
