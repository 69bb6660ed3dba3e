/** `arl runs diff`: the options in which runs differ, and what each reached. */
import { jsonLine } from "../report/index.js";
import { difference, differenceText } from "../report/runs/describe.js";
import { JSON_FLAG, parseCommand } from "./command.js";
import { runAt } from "./runs.js";

export const COMMAND = {
	name: "arl runs diff",
	usage: "DIR DIR ...",
	about: "Shows the options in which runs differ, and the figures that each reached. Each DIR is an output_dir.",
	flags: { json: JSON_FLAG },
	words: { noun: "two output_dirs or more", least: 2, most: Number.POSITIVE_INFINITY },
};

/** Runs the command; gives the exit code. */
export async function run(given: readonly string[]): Promise<number> {
	const parsed = parseCommand(COMMAND, given);
	if (parsed === null) return 0;
	const runs = parsed.words.map(runAt);
	const found = difference(runs);
	const json = () => jsonLine({ runs: runs.map(({ folder }) => folder), ...found });
	process.stdout.write(parsed.flags.json ? `${json()}\n` : `${differenceText(runs, found).join("\n")}\n`);
	return 0;
}
