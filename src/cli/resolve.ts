/** From the words of a command that takes the options of a run to those options: flags over a file over defaults. */
import {
	environmentLayer,
	type Fields,
	findConfig,
	type Layer,
	loadConfigFile,
	type Resolved,
	resolveConfig,
	show,
	stringOrNone,
	type Values,
} from "../config/index.js";
import { ArlError } from "../errors.js";
import { type Command, parseCommand } from "./command.js";

const CONFIG = stringOrNone({
	expects: "a file",
	literal: true,
	description:
		"File of options, which may be named without the flag too: .yaml, .json, or a module such as arl.config.ts. Without one, `arl.config.*` of the working directory is read.",
});

/** A command that takes the options of a run, as flags and in a file. */
export function withOptions<F extends Fields>(command: Command<F>) {
	const words = { noun: "a configuration file", least: 0, most: Number.POSITIVE_INFINITY };
	return { ...command, words, takesOptions: true, flags: { config: CONFIG, ...command.flags } };
}

/**
 * The options and the command's own flags; null: the words ask for help, which is printed. `assumed`: options that the
 * command does not ask its user for. `world`: of a command that trains or plans, the ranks as `resolveConfig` takes them.
 */
export async function resolveCommand<F extends Fields & { config: typeof CONFIG }>(
	command: Command<F>,
	given: readonly string[],
	assumed: Readonly<Record<string, unknown>> = {},
	world: (flags: Values<F>) => number | null | undefined = () => undefined,
): Promise<{ resolved: Resolved; flags: Values<F> } | null> {
	const parsed = parseCommand(command, given);
	if (parsed === null) return null;
	const { flags, options, words } = parsed;
	const named = [...words, ...(flags.config === null ? [] : [flags.config])];
	if (named.length > 1) {
		throw new ArlError(
			"ARL_USAGE",
			`one configuration file at most, and got ${named.map(show).join(", ")}`,
			"Rows are given with --train_file.",
		);
	}
	const path = named[0] ?? findConfig();
	const layers: Layer[] = [{ origin: "default", values: Object.entries(assumed) }];
	if (path !== undefined) layers.push(await loadConfigFile(path));
	layers.push({ origin: "flag", values: options });
	const resolved = resolveConfig([...environmentLayer(layers), ...layers], world(flags));
	if (path !== undefined && named.length === 0) resolved.notices.unshift(`options are read from ${path}`);
	return { resolved, flags };
}
