/** `arl mongo`: AgentRL's collections from the command line. Each of its commands is loaded only when it is called. */

import { nearest } from "../config/values.js";
import { ArlError, EXIT_CODES } from "../errors.js";

const COMMANDS: Readonly<
	Record<string, { summary: string; load(): Promise<{ run(words: string[]): Promise<number> }> }>
> = {
	import: { summary: "rows of files into the database", load: () => import("./mongo-import.js") },
	export: { summary: "rows of the database into a file, JSONL or Parquet", load: () => import("./mongo-export.js") },
	status: {
		summary: "what is in the database, and the index that is missing",
		load: () => import("./mongo-status.js"),
	},
};

function help(): string {
	const width = Math.max(...Object.keys(COMMANDS).map((name) => name.length));
	const lines = Object.entries(COMMANDS).map(([name, { summary }]) => `  ${name.padEnd(width)}  ${summary}`);
	return `Usage: arl mongo COMMAND --db_connection_string mongodb://HOST/DB ...

Rows of a MongoDB database, as AgentRL keeps them. \`arl train --db_connection_string\` trains on them.

${lines.join("\n")}

\`arl mongo COMMAND --help\` tells what a command takes. \`npm run mongo\` in a clone starts a server for trying things out.
`;
}

/** Runs the command; gives the exit code. */
export async function run(words: string[]): Promise<number> {
	const [name, ...rest] = words;
	if (name === undefined) {
		process.stderr.write(help());
		return EXIT_CODES.ARL_USAGE;
	}
	if (name === "--help" || name === "help") {
		process.stdout.write(help());
		return 0;
	}
	const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
	if (command !== undefined) return (await command.load()).run(rest);
	const near = nearest(name, Object.keys(COMMANDS));
	throw new ArlError(
		"ARL_USAGE",
		`arl mongo has no command ${JSON.stringify(name)}`,
		near === undefined ? "`arl mongo --help` lists the commands." : `Did you mean ${near}?`,
	);
}
