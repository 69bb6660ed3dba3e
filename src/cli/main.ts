#!/usr/bin/env node
/** The program `arl`. */
import { main } from "./commands.js";

// Whoever reads the output may stop reading (`arl ... | head`): that ends the output, not the run.
for (const stream of [process.stdout, process.stderr]) {
	stream.on("error", (error: NodeJS.ErrnoException) => {
		if (error.code !== "EPIPE") throw error;
	});
}

process.exitCode = await main(process.argv.slice(2));
