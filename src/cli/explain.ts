/** `arl explain`: what an error code means, what leads to it, and what to do. */
import pc from "picocolors";
import { nearest, wrap } from "../config/index.js";
import { ArlError, EXIT_CODES, EXIT_MEANINGS, isErrorCode } from "../errors.js";
import { jsonLine } from "../report/index.js";
import { wantsColor } from "../report/terminal.js";
import { JSON_FLAG, parseCommand } from "./command.js";
import { CODES, EXPLANATIONS } from "./explanations.js";

export const COMMAND = {
	name: "arl explain",
	usage: "[CODE]",
	about: `Explains an error code: what it means, what leads to it, and what to do. Without a code it lists all of them.
  arl explain ARL_DATA`,
	words: { noun: "a code", least: 0, most: 1, choices: CODES },
	flags: { json: JSON_FLAG },
};

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[]): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const [word] = given.words;
	const { json } = given.flags;
	if (word === undefined) {
		process.stdout.write(json ? `${jsonLine(CODES.map(asJson))}\n` : list());
		return 0;
	}
	const upper = word.toUpperCase();
	const code = [upper, `ARL_${upper}`].find(isErrorCode);
	if (code === undefined) {
		const near = nearest(upper, CODES) ?? nearest(`ARL_${upper}`, CODES);
		const hint = near === undefined ? "`arl explain` lists the codes." : `Did you mean ${near}?`;
		throw new ArlError("ARL_USAGE", `there is no error code ${JSON.stringify(word)}`, hint);
	}
	process.stdout.write(json ? `${jsonLine(asJson(code))}\n` : text(code));
	return 0;
}

function asJson(code: (typeof CODES)[number]) {
	return { code, exitCode: EXIT_CODES[code], ...EXPLANATIONS[code] };
}

function list(): string {
	const width = Math.max(...CODES.map((code) => code.length));
	return CODES.map((code) => `${code.padEnd(width)}  ${EXPLANATIONS[code].meaning}\n`).join("");
}

function text(code: (typeof CODES)[number]): string {
	const { bold, cyan, dim } = pc.createColors(wantsColor(process.stdout));
	const { meaning, causes, fixes, example } = EXPLANATIONS[code];
	const exit = EXIT_CODES[code];
	const width = Math.min(110, process.stdout.columns || 100);
	const item = (mark: string) => (entry: string) => {
		const [first = "", ...rest] = wrap(entry, width - 4);
		return [`  ${mark} ${first}`, ...rest.map((line) => `    ${line}`)];
	};
	const lines = [
		`${bold(code)} ${dim(`exit code ${exit}: ${EXIT_MEANINGS[exit]}`)}`,
		...wrap(meaning, width),
		"",
		cyan("causes"),
		...causes.flatMap(item("-")),
		"",
		cyan("what to do"),
		...fixes.flatMap(item("-")),
	];
	if (example !== null) {
		const printed = example.prints.split("\n").map((line) => `  ${dim(line)}`);
		lines.push("", cyan("example"), ...example.command.split("\n").map((line) => `  $ ${line}`), ...printed);
	}
	return `${lines.join("\n")}\n`;
}
