import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { main } from "../src/cli/commands.js";
import { OPTION_NAMES } from "../src/config/index.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";

const folder = temporaryFolder();

const output = capturedOutput();

const REQUIRED = ["--model_name_or_path", "model", "--output_dir", "out"];

describe("arl", () => {
	it("without a command shows help on stderr and ends with 2", async () => {
		expect(await main([])).toBe(2);
		expect(output.stderr).toContain("Usage: arl");
		expect(output.stdout).toBe("");
	});

	it("--help lists the commands and the exit codes, on stdout", async () => {
		expect(await main(["--help"])).toBe(0);
		for (const word of ["train", "generate", "doctor", "schema", "130  interrupted"])
			expect(output.stdout).toContain(word);
	});

	it("refuses an unknown command with the nearest one", async () => {
		expect(await main(["trian"])).toBe(2);
		expect(output.stderr).toBe('ARL_USAGE arl has no command "trian"\n  what to do: Did you mean train?\n');
	});

	it("reads a command of a command, its help by `help` and by flag, and names one that it does not have", async () => {
		expect(await main(["mongo"])).toBe(2);
		expect(output.stderr).toContain("Usage: arl mongo COMMAND");
		expect(await main(["mongo", "import", "--help"])).toBe(0);
		const help = output.stdout;
		expect(help).toMatch(/^Usage: arl mongo import FILE/);
		output.stdout = "";
		expect(await main(["help", "mongo", "import"])).toBe(0);
		expect(output.stdout).toBe(help);
		output.stderr = "";
		expect(await main(["mongo", "exprot"])).toBe(2);
		expect(output.stderr).toBe('ARL_USAGE arl mongo has no command "exprot"\n  what to do: Did you mean export?\n');
	});

	it("refuses too few and too many words", async () => {
		expect(await main(["mongo", "import"])).toBe(2);
		expect(output.stderr).toContain("ARL_USAGE arl mongo import needs a file of rows\n");
		expect(await main(["doctor", "all"])).toBe(2);
		expect(output.stderr).toContain('ARL_USAGE arl doctor: unexpected "all"\n');
	});

	it("--version is that of the package", async () => {
		expect(await main(["--version"])).toBe(0);
		expect(output.stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
	});
});

describe("arl train", () => {
	it("--help and `help train` list every option", async () => {
		expect(await main(["train", "--help"])).toBe(0);
		const help = output.stdout;
		for (const name of OPTION_NAMES) expect(help).toContain(`--${name} `);
		output.stdout = "";
		expect(await main(["help", "train"])).toBe(0);
		expect(output.stdout).toBe(help);
	});

	it("--print_config shows values and origins from a file and flags", async () => {
		const file = join(folder, "run.yaml");
		writeFileSync(file, "learning_rate: 1e-3\nbf16: true\n");
		expect(await main(["train", "--config", file, ...REQUIRED, "--no_bf16", "--print_config"])).toBe(0);
		expect(output.stdout).toMatch(new RegExp(`^learning_rate +0.001 +${file}$`, "m"));
		expect(output.stdout).toMatch(/^bf16 +false +flag$/m);
		output.stdout = "";
		expect(await main(["train", file, ...REQUIRED, "--print_config", "--json"])).toBe(0);
		expect(JSON.parse(output.stdout)).toMatchObject({ bf16: { value: true, origin: file } });
	});

	it("ends with 2 and says what is wrong on stderr alone", async () => {
		expect(await main(["train", ...REQUIRED, "--learning_rate", "1e400"])).toBe(2);
		expect(output.stderr).toBe('ARL_CONFIG learning_rate: "1e400" (a flag); expected a number, 0 or more\n');
		expect(output.stdout).toBe("");
		expect(await main(["train", ...REQUIRED, "--colour", "red"])).toBe(2);
		expect(output.stderr).toContain("unknown option --colour");
	});

	it("ends with 2 where no rows are given, and where two files of options are", async () => {
		expect(await main(["train", ...REQUIRED])).toBe(2);
		expect(output.stderr).toContain("train_file is missing");
		expect(await main(["train", "a.yaml", "b.yaml", ...REQUIRED])).toBe(2);
		expect(output.stderr).toContain("one configuration file at most");
	});

	it("points rows that were given in place of options to their flag", async () => {
		const file = join(folder, "rows.jsonl");
		writeFileSync(file, "{}\n");
		expect(await main(["train", file, ...REQUIRED])).toBe(2);
		expect(output.stderr).toContain("Rows are given with --train_file");
	});

	it("--json tells an error as one JSON line on stdout, also one of the options", async () => {
		expect(await main(["train", ...REQUIRED, "--json", "--tp_size", "8"])).toBe(2);
		expect(JSON.parse(output.stdout)).toMatchObject({ type: "error", code: "ARL_CONFIG", exitCode: 2 });
	});

	it("never shows a connection string", async () => {
		const words = ["train", ...REQUIRED, "--db_connection_string", "mongodb://user:hunter2@host", "--print_config"];
		expect(await main(words)).toBe(0);
		expect(output.stdout).toMatch(/db_connection_string +\*\*\* +flag/);
		expect(await main([...words, "--json"])).toBe(0);
		expect(await main(["train", "mongodb://user:hunter2@host", ...REQUIRED])).toBe(2);
		expect(await main(["train", "mongodb://user:hunter2@host", "a.yaml", ...REQUIRED])).toBe(2);
		expect(output.stdout + output.stderr).not.toContain("hunter2");
	});
});

describe("arl schema", () => {
	it("prints a JSON Schema and takes nothing else", async () => {
		expect(await main(["schema"])).toBe(0);
		expect(JSON.parse(output.stdout)).toMatchObject({ type: "object", additionalProperties: false });
		expect(await main(["schema", "x"])).toBe(2);
	});
});
