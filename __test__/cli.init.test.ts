/** `arl init`: what it writes runs as written, and replaces nothing. */
import { spawnSync } from "node:child_process";
import { cpSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import sharp from "sharp";
import { describe, expect, it } from "vitest";
import { main } from "../src/cli/commands.js";
import { TEMPLATES } from "../src/cli/init-templates.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();
const PYTHON = process.env.ARL_PYTHON ?? "python3";
const hasTerminals = spawnSync(PYTHON, ["-c", "import pty; pty.openpty()"]).status === 0;
if (!hasTerminals) process.stderr.write(`SKIPPED: the questions of arl init: ${PYTHON} cannot open a terminal\n`);
const output = capturedOutput();
const model = join(folder, "model");
cpSync(join(root, "assets", "model"), model, { recursive: true });

/** Runs the program in a folder, with `input` on its standard input. */
function arl(words: readonly string[], cwd: string, input = "", env: NodeJS.ProcessEnv = {}) {
	const program = join(root, "dist", "cli", "main.js");
	const all = { ...process.env, NO_COLOR: "1", ...env };
	const { status, stdout, stderr } = spawnSync(process.execPath, [program, ...words], {
		cwd,
		input,
		encoding: "utf8",
		env: all,
	});
	return { code: status, stdout, stderr };
}

describe("arl init", () => {
	it.each(["chat", "tools", "completion"] as const)(
		"writes a project of %s rows that checks, trains and replies as its scripts say",
		async (template) => {
			const dir = join(folder, template);
			expect(await main(["init", dir, "--template", template, "--model", model, "--yes"])).toBe(0);
			expect(output.stdout).toContain("next:\n");
			const { scripts, dependencies } = JSON.parse(readFileSync(join(dir, "package.json"), "utf8"));
			expect(dependencies).toEqual({ arl: JSON.parse(readFileSync(join(root, "package.json"), "utf8")).version });
			// The scripts themselves, but for two steps in place of three epochs.
			const script = (name: string) =>
				String(scripts[name])
					.replace(/^arl /, "")
					.match(/"[^"]*"|\S+/g)
					?.map((word) => word.replaceAll('"', "")) ?? [];
			const check = arl(script("check"), dir);
			expect({ code: check.code, said: check.stderr }).toMatchObject({ code: 0 });
			const train = arl([...script("train"), "--max_steps", "2", "--device", "cpu"], dir);
			expect({ code: train.code, said: train.stderr }).toMatchObject({ code: 0 });
			expect(existsSync(join(dir, "out", "adapter_model.safetensors"))).toBe(true);
			const reply = scripts.chat === undefined ? script("generate") : [...script("chat"), "--max_new_tokens", "4"];
			const said = arl([...reply, "--device", "cpu"], dir, "Hello\n");
			expect({ code: said.code, said: said.stderr }).toMatchObject({ code: 0 });
		},
		180_000,
	);

	it("writes pictures with their rows, a question about each, and takes a model that sees", async () => {
		const dir = join(folder, "images");
		expect(await main(["init", dir, "--template", "images", "--yes"])).toBe(0);
		const config = readFileSync(join(dir, "arl.config.ts"), "utf8");
		expect(config).toContain('model_name_or_path: "Qwen/Qwen3-VL-2B-Instruct"');
		expect(config).toContain('image_root: "data"');
		const rows = ["train", "heldout"].flatMap((name) =>
			readFileSync(join(dir, "data", `${name}.jsonl`), "utf8")
				.trim()
				.split("\n")
				.map((line) => JSON.parse(line)),
		);
		expect(rows).toHaveLength(12);
		for (const { messages } of rows) {
			const picture = readFileSync(join(dir, "data", messages[0].content[0].image_url.url));
			const { data } = await sharp(picture).raw().toBuffer({ resolveWithObject: true });
			// The colour of the first shape's centre is the one that the answer names.
			const [red = 0, green = 0, blue = 0] = data.subarray(3 * (90 * 256 + 70));
			const colour = red > green && red > blue ? "red" : green > blue ? "green" : "blue";
			expect(messages[1].content).toContain(colour);
		}
	});

	it("names the model of the Hub that a newcomer can take, and asks nothing with --yes", async () => {
		const dir = join(folder, "yes");
		expect(await main(["init", dir, "--yes", "--json"])).toBe(0);
		expect(JSON.parse(output.stdout)).toMatchObject({
			folder: dir,
			template: "chat",
			model: "Qwen/Qwen3-0.6B",
			kept: [],
		});
		expect(readFileSync(join(dir, "arl.config.ts"), "utf8")).toContain('model_name_or_path: "Qwen/Qwen3-0.6B"');
	});

	it("writes no password into a project on a database", async () => {
		const dir = join(folder, "mongo");
		expect(await main(["init", dir, "--yes", "--template", "mongo", "--model", model])).toBe(0);
		const config = readFileSync(join(dir, "arl.config.ts"), "utf8");
		expect(config).toContain("ARL_DB_CONNECTION_STRING");
		expect(config).not.toContain("mongodb://");
		const { code, stdout, stderr } = arl(["train", "--print_config"], dir, "", {
			ARL_DB_CONNECTION_STRING: "mongodb://127.0.0.1:1/arl",
		});
		expect({ code, stderr }).toMatchObject({ code: 0 });
		expect(stdout).toMatch(/^db_connection_string +\*\*\* +ARL_DB_CONNECTION_STRING$/m);
	});

	it("replaces no file: a project's own stay, and a configuration that is there is an error", async () => {
		const dir = join(folder, "there");
		mkdirSync(dir);
		writeFileSync(join(dir, "package.json"), "{}");
		expect(await main(["init", dir, "--yes"])).toBe(0);
		expect(readFileSync(join(dir, "package.json"), "utf8")).toBe("{}");
		expect(output.stdout).toContain("left as they are: package.json");
		expect(await main(["init", dir, "--yes"])).toBe(2);
		expect(output.stderr).toMatch(
			/^ARL_CONFIG \S+ has arl\.config\.ts, data\/train\.jsonl, data\/heldout\.jsonl already/,
		);
	});

	it("without a terminal says how to answer its questions beforehand", async () => {
		const { code, stderr } = arl(["init", join(folder, "asked")], folder);
		expect(code).toBe(2);
		expect(stderr).toContain("--yes");
		expect(existsSync(join(folder, "asked"))).toBe(false);
	});

	it.skipIf(!hasTerminals)(
		"asks in a terminal for what is not given, and makes nothing where its user leaves",
		() => {
			const talk = (steps: [string, string][]) => {
				// A new terminal has no columns.
				const sized = ["bash", "-c", 'stty cols 100; exec "$@"', "bash"];
				const program = [...sized, process.execPath, join(root, "dist", "cli", "main.js"), "init"];
				const script = join(root, "__test__", "support", "talk.py");
				const env = { ...process.env, TERM: "xterm" };
				const done = spawnSync(PYTHON, [script, JSON.stringify(steps), ...program], {
					encoding: "utf8",
					env,
					cwd: folder,
				});
				expect(done.status, done.stderr).toBe(0);
				return JSON.parse(done.stdout) as { code: number | null; shown: string };
			};
			const asked = talk([
				["Which folder?", "/asked\r"],
				["What are your rows?", "\x1b[B\r"],
				["Which model", "\r"],
			]);
			expect(asked.code, asked.shown).toBe(0);
			expect(readFileSync(join(folder, "asked", "data", "train.jsonl"), "utf8")).toContain("get_weather");
			expect(readFileSync(join(folder, "asked", "arl.config.ts"), "utf8")).toContain("Qwen/Qwen3-0.6B");
			const left = talk([
				["Which folder?", "/left\r"],
				["What are your rows?", "\x03"],
			]);
			expect(left.code, left.shown).toBe(130);
			expect(existsSync(join(folder, "left"))).toBe(false);
		},
		60_000,
	);

	it("has templates with rows to train, and the steps that follow", () => {
		for (const { train, steps } of Object.values(TEMPLATES)) {
			expect(train.length).toBeGreaterThan(4);
			expect(steps.length).toBeGreaterThan(2);
		}
	});
});
