/** `arl watch`: a run in the terminal as it goes, from its files. */
import { setTimeout } from "node:timers/promises";
import { number } from "../config/index.js";
import type { RunReader } from "../report/runs/read-run.js";
import { closingLines } from "../report/runs/sentences.js";
import { watchLine, watchLines } from "../report/runs/watch.js";
import { isTerminal } from "../report/terminal.js";
import { parseCommand } from "./command.js";
import { runAt } from "./runs.js";
import { stoppable } from "./signals.js";

export const COMMAND = {
	name: "arl watch",
	usage: "DIR [--every SECONDS]",
	about: `Shows a run as it goes, from the files in its output_dir: figures and curves that are drawn over, or a line for each
logged step where the output is no terminal. Ends when the run does: with 0, or with 1 if it failed or its process died.`,
	flags: { every: number({ above: 0, default: 1, description: "Seconds between two looks at the files." }) },
	words: { noun: "the output_dir of a run", least: 1, most: 1 },
};

/** Runs the command; gives the exit code. */
export async function run(given: readonly string[]): Promise<number> {
	const parsed = parseCommand(COMMAND, given);
	if (parsed === null) return 0;
	const found = runAt(parsed.words[0] ?? ".");
	return await stoppable((signal) => watch(found, parsed.flags.every * 1000, signal));
}

async function watch(found: RunReader, milliseconds: number, signal: AbortSignal): Promise<number> {
	const show = isTerminal(process.stdout) ? screen(process.stdout) : log(process.stdout);
	show(found);
	// A folder with metrics alone says nothing of an end.
	while (found.state === "running") {
		await setTimeout(milliseconds, undefined, { signal });
		found.update();
		show(found);
	}
	const { record, folder, state } = found;
	if (record?.end) process.stdout.write(`${closingLines(record, folder).join("\n")}\n`);
	else process.stdout.write(`${folder}: ${state}${record?.error ? `, ${record.error.message}` : ""}\n`);
	return state === "failed" || state === "died" ? 1 : 0;
}

/** Draws over what it has drawn before. */
function screen(terminal: NodeJS.WriteStream): (run: RunReader) => void {
	let drawn: string[] = [];
	return (run) => {
		const lines = watchLines(run, Math.max(20, (terminal.columns || 80) - 1));
		if (lines.join("\n") === drawn.join("\n")) return;
		terminal.write(`${drawn.length > 0 ? `\x1b[${drawn.length}A\r\x1b[J` : ""}${lines.join("\n")}\n`);
		drawn = lines;
	};
}

/** Writes a line where there is a new step. */
function log(stream: NodeJS.WriteStream): (run: RunReader) => void {
	let written = "";
	return (run) => {
		const line = watchLine(run);
		if (line !== written) stream.write(`${line}\n`);
		written = line;
	};
}
