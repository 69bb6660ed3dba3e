/** `arl explain`, docs/errors.md, and that both say what is true: their examples are run. */
import { spawnSync } from "node:child_process";
import { mkdirSync, readFileSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { main } from "../src/cli/commands.js";
import { CODES, EXPLANATIONS, errorsMarkdown } from "../src/cli/explanations.js";
import { OPTION_NAMES } from "../src/config/index.js";
import { ArlError, EXIT_CODES, formatError } from "../src/errors.js";
import { loadNative } from "../src/native.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();
const output = capturedOutput();

describe("the table of codes", () => {
	it("has every code of the core, and those of the command line", () => {
		expect([...loadNative().errorCodes(), "ARL_USAGE"].sort()).toEqual([...CODES].sort());
	});

	it("explains each: what it means, what leads to it, what to do", () => {
		expect(Object.keys(EXPLANATIONS)).toEqual(Object.keys(EXIT_CODES));
		for (const { meaning, causes, fixes } of Object.values(EXPLANATIONS)) {
			expect(meaning).toMatch(/^[A-Za-z].*\.$/);
			expect(causes.length).toBeGreaterThan(0);
			expect(fixes.length).toBeGreaterThan(0);
			for (const line of [...causes, ...fixes]) expect(line).toMatch(/\S{3}/);
		}
	});

	it("names only flags and commands that exist", async () => {
		const texts = Object.values(EXPLANATIONS).flatMap(({ causes, fixes }) => [...causes, ...fixes]);
		const known: string[] = [...OPTION_NAMES, "help", "print_config"];
		for (const [, flag] of texts.join("\n").matchAll(/--([a-z_0-9]+)/g)) expect(known).toContain(flag);
		output.stdout = "";
		await main(["--help"]);
		for (const [, command] of texts.join("\n").matchAll(/`npx arl ([a-z]+)/g))
			expect(output.stdout).toContain(`  ${command} `);
	});

	it("is the page in docs/", () => {
		expect(readFileSync(join(root, "docs", "errors.md"), "utf8"), "run `npm run docs:errors`").toBe(errorsMarkdown());
	});

	const examples = CODES.flatMap((code) => {
		const { example } = EXPLANATIONS[code];
		return example === null ? [] : [{ code, ...example }];
	});
	it.each(examples)(
		"has an example of $code that ends so",
		async ({ code, command, prints }) => {
			const place = join(folder, code);
			mkdirSync(place);
			symlinkSync(join(root, "assets"), join(place, "assets"));
			// As in a clone: `npx arl` is the program of this package.
			const program = [process.execPath, join(root, "dist", "cli", "main.js")]
				.map((word) => JSON.stringify(word))
				.join(" ");
			const script = `npx() { shift; ${program} "$@"; }\n${command}`;
			const env = { ...process.env, NO_COLOR: "1", HF_HUB_CACHE: "", ARL_CUDA_LIBRARIES: "" };
			const { status, stderr } = spawnSync("bash", ["-c", script], { cwd: place, env, encoding: "utf8" });
			expect(stderr).toContain(prints);
			expect(prints.startsWith(code)).toBe(true);
			expect(status).toBe(EXIT_CODES[code]);
		},
		120_000,
	);
});

describe("arl explain", () => {
	it("explains one code, in any spelling, and lists all", async () => {
		for (const word of ["ARL_DATA", "arl_data", "data"]) {
			output.stdout = "";
			expect(await main(["explain", word])).toBe(0);
			expect(output.stdout).toMatch(/^ARL_DATA exit code 3: /);
		}
		output.stdout = "";
		expect(await main(["explain"])).toBe(0);
		expect(output.stdout.trimEnd().split("\n")).toHaveLength(CODES.length);
		output.stdout = "";
		expect(await main(["explain", "ARL_OOM", "--json"])).toBe(0);
		expect(JSON.parse(output.stdout)).toMatchObject({ code: "ARL_OOM", exitCode: 4, ...EXPLANATIONS.ARL_OOM });
	});

	it("refuses a code that there is not, with the nearest one", async () => {
		expect(await main(["explain", "ARL_DATTA"])).toBe(2);
		expect(output.stderr).toBe('ARL_USAGE there is no error code "ARL_DATTA"\n  what to do: Did you mean ARL_DATA?\n');
	});

	it("is where an error without a hint points", () => {
		const bare = new ArlError("ARL_IO", "no room");
		expect(formatError(bare, { explain: true })).toBe("ARL_IO no room\n  what to do: see `arl explain ARL_IO`\n");
		const hinted = new ArlError("ARL_IO", "no room", "Make some.");
		expect(formatError(hinted, { explain: true })).not.toContain("explain");
		expect(formatError(new ArlError("ARL_INTERRUPTED", "stopped"), { explain: true })).toBe(
			"ARL_INTERRUPTED stopped\n",
		);
	});
});
