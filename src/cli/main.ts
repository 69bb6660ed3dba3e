#!/usr/bin/env node
/** The program `arl`. */
import { main } from "./commands.js";
import { hungUp } from "./signals.js";

// A reader that stops reading (`arl ... | head`) or a terminal that is closed ends the output, not the run.
for (const stream of [process.stdout, process.stderr]) {
	stream.on("error", (error: NodeJS.ErrnoException) => {
		if (error.code !== "EPIPE" && error.code !== "EIO") throw error;
	});
}

process.exitCode = await main(process.argv.slice(2));
// Ends the process by the signal of the closed terminal, as no handler is left. A normal exit of Node would try to restore the
// settings of that terminal, and abort. Windows sends that signal, and lets no program send it.
if (hungUp() && process.platform !== "win32") process.kill(process.pid, "SIGHUP");
