/** From the words of a command that takes the options of a run to those options: flags over a file over defaults. */

import type { CommandFlags } from "../config/flags.js";
import {
	environmentLayer,
	findConfig,
	type Layer,
	loadConfigFile,
	parseFlags,
	type Resolved,
	resolveConfig,
	show,
} from "../config/index.js";
import { ArlError } from "../errors.js";

/** What a command adds. */
export interface CommandShape {
	/** Its own flags, `config` and `help` among them. */
	flags: CommandFlags;
	help: () => string;
	/** Options that it does not ask its user for. */
	assumed?: readonly (readonly [string, unknown])[];
}

/** The options and the command's own flags; null: help was asked for and shown. */
export async function resolveWords(
	words: readonly string[],
	{ flags, help, assumed = [] }: CommandShape,
): Promise<{ resolved: Resolved; command: Map<string, string | true> } | null> {
	const { options, command, positional } = parseFlags(words, flags);
	if (command.has("help")) {
		process.stdout.write(help());
		return null;
	}
	const named = [...positional, ...(command.has("config") ? [String(command.get("config"))] : [])];
	if (named.length > 1) {
		throw new ArlError(
			"ARL_USAGE",
			`one configuration file at most, and got ${named.map(show).join(", ")}`,
			"Rows are given with --train_file.",
		);
	}
	const path = named[0] ?? findConfig();
	const layers: Layer[] = [{ origin: "default", values: assumed }];
	if (path !== undefined) layers.push(await loadConfigFile(path));
	layers.push({ origin: "flag", values: options });
	const resolved = resolveConfig([...environmentLayer(layers), ...layers]);
	if (path !== undefined && named.length === 0) resolved.notices.unshift(`options are read from ${path}`);
	return { resolved, command };
}

/** The whole number, 1 or more, that a command's own flag `name` gives; null: it is not given. */
export function wholeNumberOf(command: ReadonlyMap<string, string | true>, name: string): number | null {
	const word = command.get(name);
	if (word === undefined) return null;
	if (/^[1-9]\d{0,9}$/.test(String(word))) return Number(word);
	throw new ArlError("ARL_USAGE", `--${name}: expected a whole number of 1 or more, got ${JSON.stringify(word)}`);
}
