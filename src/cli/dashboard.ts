/** `arl dashboard`: the page of runs in a browser, live. */
import { integer } from "../config/index.js";
import { parseCommand } from "./command.js";
import { runFolders } from "./runs.js";
import { onStopSignals } from "./signals.js";

export const COMMAND = {
	name: "arl dashboard",
	usage: "[DIR ...] [--port N]",
	about: `Shows runs in a browser, live: one run as its report.html does, several next to each other. Takes output_dirs and
folders with such in them, the working directory if none is named; runs that start later appear by themselves.

It only reads files, so that it may start, stop and start again at any time. It listens on 127.0.0.1 alone, and answers only
to the address that it prints, which has a token. From another machine: ssh -L PORT:127.0.0.1:PORT HOST.`,
	flags: {
		port: integer({ min: 0, max: 65_535, default: 0, description: "Port on 127.0.0.1; 0: a free one." }),
	},
	words: { noun: "folders", least: 0, most: Number.POSITIVE_INFINITY },
};

/** Runs the command until a signal ends it; gives the exit code. */
export async function run(given: readonly string[]): Promise<number> {
	const parsed = parseCommand(COMMAND, given);
	if (parsed === null) return 0;
	const folders = parsed.words.length > 0 ? parsed.words : ["."];
	const found = runFolders(folders).length;
	const { openDashboard } = await import("../report/dashboard/server.js");
	const dashboard = await openDashboard({ folders, port: parsed.flags.port });
	const stop = onStopSignals(() => {});
	process.stderr.write(`${found === 1 ? "1 run" : `${found} runs`}; Ctrl-C ends the dashboard\n`);
	process.stdout.write(`${dashboard.url}\n`);
	await new Promise<void>((ended) => {
		if (stop.signal.aborted) ended();
		else stop.signal.addEventListener("abort", () => ended(), { once: true });
	});
	stop.release();
	await dashboard.close();
	return 0;
}
