import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { main } from "../src/cli/commands.js";
import { OPTION_NAMES } from "../src/config/index.js";

const folder = mkdtempSync(join(tmpdir(), "arl-cli-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

let stdout = "";
let stderr = "";

beforeEach(() => {
	stdout = "";
	stderr = "";
	vi.stubEnv("NO_COLOR", "1");
	vi.spyOn(process.stdout, "write").mockImplementation((text) => {
		stdout += String(text);
		return true;
	});
	vi.spyOn(process.stderr, "write").mockImplementation((text) => {
		stderr += String(text);
		return true;
	});
});

afterEach(() => {
	vi.restoreAllMocks();
	vi.unstubAllEnvs();
});

const REQUIRED = ["--model_name_or_path", "model", "--output_dir", "out"];

describe("arl", () => {
	it("without a command shows help on stderr and ends with 2", async () => {
		expect(await main([])).toBe(2);
		expect(stderr).toContain("Usage: arl");
		expect(stdout).toBe("");
	});

	it("--help lists the commands and the exit codes, on stdout", async () => {
		expect(await main(["--help"])).toBe(0);
		for (const word of ["train", "generate", "doctor", "schema", "130  interrupted"]) expect(stdout).toContain(word);
	});

	it("refuses an unknown command with the nearest one", async () => {
		expect(await main(["trian"])).toBe(2);
		expect(stderr).toBe('ARL_USAGE arl has no command "trian"\n  what to do: Did you mean train?\n');
	});

	it("--version is that of the package", async () => {
		expect(await main(["--version"])).toBe(0);
		expect(stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
	});
});

describe("arl train", () => {
	it("--help and `help train` list every option", async () => {
		expect(await main(["train", "--help"])).toBe(0);
		const help = stdout;
		for (const name of OPTION_NAMES) expect(help).toContain(`--${name} `);
		stdout = "";
		expect(await main(["help", "train"])).toBe(0);
		expect(stdout).toBe(help);
	});

	it("--print_config shows values and origins from a file and flags", async () => {
		const file = join(folder, "run.yaml");
		writeFileSync(file, "learning_rate: 1e-3\nbf16: true\n");
		expect(await main(["train", "--config", file, ...REQUIRED, "--no_bf16", "--print_config"])).toBe(0);
		expect(stdout).toMatch(new RegExp(`^learning_rate +0.001 +${file}$`, "m"));
		expect(stdout).toMatch(/^bf16 +false +flag$/m);
		stdout = "";
		expect(await main(["train", file, ...REQUIRED, "--print_config", "--json"])).toBe(0);
		expect(JSON.parse(stdout)).toMatchObject({ bf16: { value: true, origin: file } });
	});

	it("ends with 2 and says what is wrong on stderr alone", async () => {
		expect(await main(["train", ...REQUIRED, "--learning_rate", "1e400"])).toBe(2);
		expect(stderr).toBe('ARL_CONFIG learning_rate: "1e400" (a flag); expected a number, 0 or more\n');
		expect(stdout).toBe("");
		expect(await main(["train", ...REQUIRED, "--colour", "red"])).toBe(2);
		expect(stderr).toContain("unknown option --colour");
	});

	it("ends with 2 where no rows are given, and where two files of options are", async () => {
		expect(await main(["train", ...REQUIRED])).toBe(2);
		expect(stderr).toContain("train_file is missing");
		expect(await main(["train", "a.yaml", "b.yaml", ...REQUIRED])).toBe(2);
		expect(stderr).toContain("one configuration file at most");
	});

	it("points rows that were given in place of options to their flag", async () => {
		const file = join(folder, "rows.jsonl");
		writeFileSync(file, "{}\n");
		expect(await main(["train", file, ...REQUIRED])).toBe(2);
		expect(stderr).toContain("Rows are given with --train_file");
	});

	it("--json tells an error as one JSON line on stdout, also one of the options", async () => {
		expect(await main(["train", ...REQUIRED, "--json", "--tp_size", "8"])).toBe(2);
		expect(JSON.parse(stdout)).toMatchObject({ type: "error", code: "ARL_CONFIG", exitCode: 2 });
	});

	it("never shows a connection string", async () => {
		const words = ["train", ...REQUIRED, "--db_connection_string", "mongodb://user:hunter2@host", "--print_config"];
		expect(await main(words)).toBe(0);
		expect(stdout).toMatch(/db_connection_string +\*\*\* +flag/);
		expect(await main([...words, "--json"])).toBe(0);
		expect(await main(["train", "mongodb://user:hunter2@host", ...REQUIRED])).toBe(2);
		expect(await main(["train", "mongodb://user:hunter2@host", "a.yaml", ...REQUIRED])).toBe(2);
		expect(stdout + stderr).not.toContain("hunter2");
	});
});

describe("arl schema", () => {
	it("prints a JSON Schema and takes nothing else", async () => {
		expect(await main(["schema"])).toBe(0);
		expect(JSON.parse(stdout)).toMatchObject({ type: "object", additionalProperties: false });
		expect(await main(["schema", "x"])).toBe(2);
	});
});
