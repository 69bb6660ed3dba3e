/** `arl schema`: the JSON Schema of a configuration file, for editors. */
import { configJsonSchema } from "../config/index.js";
import { parseCommand } from "./command.js";

export const COMMAND = {
	name: "arl schema",
	usage: "> arl.schema.json",
	about: "Prints the JSON Schema of a configuration file of `arl train`.",
	flags: {},
};

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[]): Promise<number> {
	if (parseCommand(COMMAND, words) === null) return 0;
	process.stdout.write(`${JSON.stringify(configJsonSchema(), null, "\t")}\n`);
	return 0;
}
