#!/usr/bin/env node
/** The program `arl`. */
import { main } from "./commands.js";
import { hungUp } from "./signals.js";

// The reader of the output may stop reading (`arl ... | head`), and a terminal may be closed: that ends the output, not the run.
for (const stream of [process.stdout, process.stderr]) {
	stream.on("error", (error: NodeJS.ErrnoException) => {
		if (error.code !== "EPIPE" && error.code !== "EIO") throw error;
	});
}

process.exitCode = await main(process.argv.slice(2));
// With no handler left, this ends the process as the closed terminal would have. Node's own end would try to restore the
// settings of that terminal, and abort.
if (hungUp()) process.kill(process.pid, "SIGHUP");
