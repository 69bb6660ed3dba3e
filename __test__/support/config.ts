/** Configurations from flags over a file, as tests give them. */
import { parseFlags, resolveConfig } from "../../src/config/index.js";
import { ArlError } from "../../src/errors.js";

const REQUIRED = ["--model_name_or_path", "model", "--output_dir", "out"];

/** The configuration of `words` over what a file `run.yaml` holds. */
export function resolve(words: string[], file: object = {}) {
	return resolveConfig([
		{ origin: "run.yaml", values: Object.entries(file) },
		{ origin: "flag", values: parseFlags([...REQUIRED, ...words]).options },
	]);
}

/** The error that such a configuration is refused with. */
export function refused(words: string[], file: object = {}): ArlError {
	try {
		resolve(words, file);
	} catch (error) {
		if (error instanceof ArlError) return error;
		throw error;
	}
	throw new Error(`accepted: ${words.join(" ")} ${JSON.stringify(file)}`);
}
