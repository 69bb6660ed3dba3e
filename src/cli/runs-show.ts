/** `arl runs show`: all that is known of a run. */
import { jsonLine } from "../report/index.js";
import { runJson, runText } from "../report/runs/describe.js";
import { JSON_FLAG, parseCommand } from "./command.js";
import { runAt } from "./runs.js";

export const COMMAND = {
	name: "arl runs show",
	usage: "DIR",
	about: "Shows what a run reached, its memory, checkpoints, warnings and options. DIR is its output_dir.",
	flags: { json: JSON_FLAG },
	words: { noun: "the output_dir of a run", least: 1, most: 1 },
};

/** Runs the command; gives the exit code. */
export async function run(given: readonly string[]): Promise<number> {
	const parsed = parseCommand(COMMAND, given);
	if (parsed === null) return 0;
	const found = runAt(parsed.words[0] ?? ".");
	process.stdout.write(parsed.flags.json ? `${jsonLine(runJson(found))}\n` : `${runText(found).join("\n")}\n`);
	return 0;
}
