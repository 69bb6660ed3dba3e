/** `arl runs ls`: a line for each run in some folders. */
import { jsonLine } from "../report/index.js";
import { runJson, runsTable } from "../report/runs/describe.js";
import { JSON_FLAG, parseCommand } from "./command.js";
import { runsIn } from "./runs.js";

export const COMMAND = {
	name: "arl runs ls",
	usage: "[DIR ...]",
	about: "Lists the runs in the folders and up to three levels below them; without one, in the working directory.",
	flags: { json: JSON_FLAG },
	words: { noun: "folders", least: 0, most: Number.POSITIVE_INFINITY },
};

/** Runs the command; gives the exit code. */
export async function run(given: readonly string[]): Promise<number> {
	const parsed = parseCommand(COMMAND, given);
	if (parsed === null) return 0;
	const runs = runsIn(parsed.words.length > 0 ? parsed.words : ["."]);
	if (parsed.flags.json) process.stdout.write(`${jsonLine(runs.map(runJson))}\n`);
	else process.stdout.write(runs.length === 0 ? "no runs\n" : `${runsTable(runs).join("\n")}\n`);
	return 0;
}
