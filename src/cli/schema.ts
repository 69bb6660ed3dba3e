/** `arl schema`: the JSON Schema of a configuration file, for editors. */
import { configJsonSchema } from "../config/index.js";
import { ArlError } from "../errors.js";

export async function run(words: readonly string[]): Promise<number> {
	if (words.includes("--help")) {
		process.stdout.write(
			"Usage: arl schema > arl.schema.json\n\nPrints the JSON Schema of `arl train`'s configuration.\n",
		);
		return 0;
	}
	if (words.length > 0)
		throw new ArlError("ARL_USAGE", `arl schema takes no words, and got ${JSON.stringify(words[0])}`);
	process.stdout.write(`${JSON.stringify(configJsonSchema(), null, "\t")}\n`);
	return 0;
}
