/** Options of the smaller commands: commander's, with the same checks and errors as everywhere. */
import { Command, CommanderError, InvalidArgumentError } from "commander";
import { optionMeta, trainingSchema } from "../config/index.js";
import { ArlError } from "../errors.js";

/** A command whose wrong use is an `ArlError`; `--help` gives null from `parse`. */
export function command(name: string, description: string): Command {
	return new Command(`arl ${name}`)
		.description(description)
		.exitOverride()
		.allowExcessArguments(false)
		.configureOutput({ outputError: () => {} });
}

/** The options that `words` give; null: help was asked for and shown. */
export function parse<T>(of: Command, words: readonly string[]): T | null {
	try {
		of.parse([...words], { from: "user" });
		return of.opts() as T;
	} catch (error) {
		if (!(error instanceof CommanderError)) throw error;
		if (error.exitCode === 0) return null;
		const [message = "", ...hints] = error.message.replace(/^error: /, "").split("\n");
		throw new ArlError(
			"ARL_USAGE",
			message,
			hints.join(" ").replace(/^\(|\)$/g, "") || `\`${of.name()} --help\` lists the options.`,
		);
	}
}

/** Reads a whole number within bounds. */
export function wholeNumber(low: number, high = Number.MAX_SAFE_INTEGER): (word: string) => number {
	return (word) => {
		const value = /^\d+$/.test(word) ? Number(word) : Number.NaN;
		if (Number.isSafeInteger(value) && value >= low && value <= high) return value;
		const bounds = high === Number.MAX_SAFE_INTEGER ? `${low} or more` : `${low} or more and at most ${high}`;
		throw new InvalidArgumentError(`Expected a whole number, ${bounds}.`);
	};
}

function plainNumber(word: string): number {
	return /^(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(word) ? Number(word) : Number.NaN;
}

/** Reads a number above `low` and of at most `high`. */
export function numberAbove(low: number, high: number): (word: string) => number {
	return (word) => {
		const value = plainNumber(word);
		if (value > low && value <= high) return value;
		throw new InvalidArgumentError(`Expected a number, above ${low} and at most ${high}.`);
	};
}

/** Reads a number of `low` or more. */
export function numberFrom(low: number): (word: string) => number {
	return (word) => {
		const value = plainNumber(word);
		if (Number.isFinite(value) && value >= low) return value;
		throw new InvalidArgumentError(`Expected a number, ${low} or more.`);
	};
}

/** Reads the name of a device as the option `device` of a run takes it. */
export function deviceName(word: string): string {
	if (trainingSchema.shape.device.safeParse(word).success) return word;
	throw new InvalidArgumentError(`Expected ${optionMeta("device").expects}.`);
}

/** What `--columns NAME=COLUMN ...` says. */
export function columns(words: readonly string[] = []): Record<string, string> {
	return Object.fromEntries(
		words.map((word) => {
			const equals = word.indexOf("=");
			if (equals < 1) throw new ArlError("ARL_USAGE", `--columns: ${JSON.stringify(word)} is not NAME=COLUMN`);
			return [word.slice(0, equals), word.slice(equals + 1)];
		}),
	);
}
