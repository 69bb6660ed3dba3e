/** Completion: what is offered where, from the table of commands, and in real shells. */
import { spawnSync } from "node:child_process";
import { chmodSync, mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { main } from "../src/cli/commands.js";
import { OPTION_NAMES } from "../src/config/index.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();
const output = capturedOutput();

/** What is offered for the last word, for bash. */
async function offered(...words: string[]): Promise<{ how: string | undefined; words: string[] }> {
	output.stdout = "";
	expect(await main(["__complete", "bash", `=${words.at(-1)}`, ...words.slice(0, -1)])).toBe(0);
	const [how, ...found] = output.stdout.trimEnd().split("\n");
	return { how, words: found };
}

describe("completion offers", () => {
	it("commands, those of groups, and those that `help` takes", async () => {
		const all = await offered("");
		expect(all).toMatchObject({ how: "words" });
		expect(all.words).toEqual(expect.arrayContaining(["train", "chat", "explain", "completion", "init", "help"]));
		expect((await offered("tr")).words).toEqual(["train"]);
		expect((await offered("mongo", "")).words).toEqual(["import", "export", "status"]);
		expect((await offered("help", "data", "c")).words).toEqual(["check"]);
		expect((await offered("cuda", "")).words).toEqual(["install", "remove"]);
		expect((await offered("nothing", "")).words).toEqual([]);
		expect((await offered("--v")).words).toEqual(["--version"]);
	});

	it("every option of a run as a flag, but those that are given", async () => {
		const { words } = await offered("train", "--");
		for (const name of OPTION_NAMES) expect(words).toContain(`--${name}`);
		expect(words).toContain("--help");
		expect((await offered("train", "--bf16", "--bf")).words).not.toContain("--bf16");
		expect((await offered("train", "--no_bf16")).words).toContain("--no_bf16");
	});

	it("the values of a flag, paths where it takes them, and words of a command", async () => {
		expect((await offered("train", "--on_bad_row", "")).words).toEqual(["error", "skip"]);
		expect((await offered("train", "--on_bad_row=s")).words).toEqual(["--on_bad_row=skip"]);
		expect((await offered("train", "--follow", "t")).words).toEqual(["true"]);
		expect(await offered("train", "--train_file", "a.jsonl", "")).toEqual({ how: "paths", words: [] });
		expect((await offered("train", "--learning_rate", "")).how).toBe("words");
		expect((await offered("train", "--output_dir", "out", "")).how).toBe("paths");
		expect((await offered("explain", "ARL_US")).words).toEqual(["ARL_USAGE", "ARL_USER"]);
		expect((await offered("completion", "z")).words).toEqual(["zsh"]);
		expect((await offered("doctor", "")).how).toBe("words");
	});

	it("descriptions to the shells that show them", async () => {
		for (const [shell, line] of [
			["zsh", "train:Fine-tune a model on rows."],
			["fish", "train\tFine-tune a model on rows."],
			["powershell", "train\tFine-tune a model on rows."],
		] as const) {
			output.stdout = "";
			await main(["__complete", shell, "=tr"]);
			expect(output.stdout).toBe(`words\n${line}\n`);
		}
	});
});

/** A folder with the program `arl`. */
function programFolder(): string {
	const bin = join(folder, "bin");
	mkdirSync(bin, { recursive: true });
	const program = join(bin, "arl");
	const main = join(root, "dist", "cli", "main.js");
	writeFileSync(program, `#!/bin/sh\nexec ${JSON.stringify(process.execPath)} ${JSON.stringify(main)} "$@"\n`);
	chmodSync(program, 0o755);
	return bin;
}

describe("arl completion", () => {
	it("prints a script for each shell, and refuses others by name", async () => {
		for (const shell of ["bash", "zsh", "fish", "powershell"]) {
			output.stdout = "";
			expect(await main(["completion", shell])).toBe(0);
			expect(output.stdout).toContain(`__complete ${shell} "=`);
		}
		expect(await main(["completion", "zhs"])).toBe(2);
		expect(output.stderr).toContain("Did you mean zsh?");
	});

	const bash = spawnSync("bash", ["--version"]).status === 0;
	it.runIf(bash)(
		"completes in a real bash, twice sourced, and evaluates nothing that was typed",
		async () => {
			writeFileSync(join(folder, "rows one.jsonl"), "");
			await main(["completion", "bash"]);
			writeFileSync(join(folder, "completion.bash"), output.stdout);
			const lines = [
				"source ./completion.bash; source ./completion.bash",
				"complete -p arl",
				`try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _arl_completion; printf '%s|' "\${COMPREPLY[@]}"; echo; }`,
				"try arl tra",
				"try arl mongo ''",
				"try arl train --on_bad_row ''",
				"try arl train --on_bad_row = s",
				"try arl train --on_bad_row =",
				"try arl train --train_file ro",
				"try arl train --train_file = ro",
				"try arl train '$(touch evaluated)' --optim",
				"ls evaluated 2>/dev/null",
			];
			writeFileSync(join(folder, "try.bash"), lines.join("\n"));
			const env = { ...process.env, PATH: `${programFolder()}:${process.env.PATH}` };
			const { stdout, stderr } = spawnSync("bash", ["try.bash"], { cwd: folder, env, encoding: "utf8" });
			expect(stderr).toBe("");
			const optim = OPTION_NAMES.filter((name) => name.startsWith("optim")).map((name) => `--${name}`);
			expect(stdout.trimEnd().split("\n")).toEqual([
				"complete -F _arl_completion arl",
				"train|",
				"import|export|status|",
				"error|skip|",
				"skip|",
				"error|skip|",
				"rows one.jsonl|",
				"rows one.jsonl|",
				`${optim.join("|")}|`,
			]);
		},
		60_000,
	);

	// What zsh's own functions would show, without a terminal.
	const ZSH = `compdef() { :; }; _describe() { print -rl -- "\${(@P)2}"; }; _files() { print -rl -- *(.) }
		source ./completion.zsh; source ./completion.zsh
		try() { words=("$@"); CURRENT=$#; _arl; }
		try arl tra; try arl mongo ""; try arl train --train_file ro; try arl train '$(touch evaluated)' --optimizer`;
	const FISH = `source completion.fish; source completion.fish
		for line in "arl tra" "arl mongo " "arl train --train_file ro" "arl train '\\$(touch evaluated)' --optimizer"
			complete -C $line
		end`;
	const shells: [string, string[]][] = [
		["zsh", ["-f", "-c", ZSH]],
		["fish", ["--no-config", "-c", FISH]],
	];
	for (const [shell, args] of shells) {
		it(`completes in a real ${shell}, and evaluates nothing that was typed`, async (context) => {
			if (spawnSync(shell, ["--version"]).error !== undefined) {
				process.stderr.write(`SKIPPED: completion in ${shell}: it is not on the path\n`);
				return context.skip();
			}
			const place = join(folder, shell);
			mkdirSync(place);
			writeFileSync(join(place, "rows one.jsonl"), "");
			await main(["completion", shell]);
			writeFileSync(join(place, `completion.${shell}`), output.stdout);
			const env = { ...process.env, HOME: place, PATH: `${programFolder()}:${process.env.PATH}` };
			const { stdout, stderr } = spawnSync(shell, args, { cwd: place, env, encoding: "utf8" });
			expect(stderr).toBe("");
			const names = stdout.split("\n").map((line) => line.split(/\t|:/)[0]);
			expect(names.filter((name) => name !== "" && name !== "completion.zsh").sort()).toEqual([
				"--optimizer_offload",
				"export",
				"import",
				"rows one.jsonl",
				"status",
				"train",
			]);
			expect(readdirSync(place)).not.toContain("evaluated");
		}, 60_000);
	}
});
