// `npm run mongo`: a MongoDB server for trying things out, on a folder that stays (`.mongo`, or --dir), until Ctrl-C.

import { resolve } from "node:path";
import { parseArgs } from "node:util";
import { installServer, startServer } from "./mongo-server.mjs";
import { root } from "./setup.mjs";

const usage = "npm run mongo [-- --dir FOLDER --port PORT]   (.mongo and 27017 unless given; port 0: any free one)";

function options() {
	try {
		const { values } = parseArgs({
			options: {
				dir: { type: "string", default: resolve(root, ".mongo") },
				port: { type: "string", default: "27017" },
				help: { type: "boolean", default: false },
			},
		});
		if (!/^\d+$/.test(values.port)) throw new Error(`--port is a number, not ${values.port}`);
		return values;
	} catch (error) {
		console.error(`${error.message}\n${usage}`);
		process.exit(2);
	}
}

const { dir, port, help } = options();
if (help) {
	console.log(usage);
	process.exit(0);
}
const reason = await installServer();
if (reason !== null) {
	console.error(`arl: no MongoDB server: ${reason}. Any MongoDB from 4.4 on does as well.`);
	process.exit(1);
}
try {
	const server = await startServer({ dir: resolve(dir), port: Number(port), args: ["--standalone"] });
	for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => server.child.kill("SIGTERM"));
	server.child.on("exit", (code, signal) => {
		console.error(`arl: the server ended; its data stays in ${resolve(dir)}`);
		process.exit(signal === null ? (code ?? 0) : 0);
	});
	console.error(`arl: MongoDB-compatible server on ${resolve(dir)}; Ctrl-C ends it. Connection string:`);
	console.log(`mongodb://127.0.0.1:${server.port}/arl`);
} catch (error) {
	console.error(`arl: ${error.message}`);
	process.exit(1);
}
