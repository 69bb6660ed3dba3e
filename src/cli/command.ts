/** What the commands of `arl` share: how each reads its words and shows its help, and groups of commands. */
import { readFileSync } from "node:fs";
import {
	checkFlags,
	type Fields,
	type FlagSet,
	flag,
	formatFlags,
	formatOptions,
	nearest,
	parseFlags,
	type Values,
	wrap,
} from "../config/index.js";
import { ArlError, EXIT_CODES } from "../errors.js";

/** A command: its name, its flags, and what else it takes. */
export interface Command<F extends Fields> extends FlagSet<F> {
	/** What follows the name in the first line of the help. */
	usage: string;
	/** What the command does, in paragraphs; help refills their lines, and keeps indented ones. */
	about: string;
	/** How many words it takes that belong to no flag, and what they are; absent: none. `choices`: all that there are. */
	words?: { noun: string; least: number; most: number; choices?: readonly string[] };
	/** Whether its help lists the options of a run too. */
	listsOptions?: boolean;
}

/** The first word with which completion scripts call `arl`; no command of a user's. */
export const COMPLETE = "__complete";

/** The `--json` of commands that report once. */
export const JSON_FLAG = flag("Print one JSON value on stdout.");

/** What a command was given. */
export interface Given<F extends Fields> {
	flags: Values<F>;
	words: string[];
	/** Of a command that takes the options of a run: those that are flags, by the names that were written. */
	options: Map<string, unknown>;
}

/**
 * Reads the words after a command's name; null: they ask for help, which is printed.
 *
 * @throws ArlError `ARL_USAGE` for a flag that the command does not have, a value that it refuses, or words too many or too few.
 */
export function parseCommand<F extends Fields>(command: Command<F>, given: readonly string[]): Given<F> | null {
	const { own, options, words, help } = parseFlags(given, command);
	if (help) {
		process.stdout.write(commandHelp(command));
		return null;
	}
	const { noun, least, most } = command.words ?? { noun: "", least: 0, most: 0 };
	const hint = `\`${command.name} --help\` shows what it takes.`;
	if (words.length < least) throw new ArlError("ARL_USAGE", `${command.name} needs ${noun}`, hint);
	const excess = words[most];
	if (excess !== undefined)
		throw new ArlError("ARL_USAGE", `${command.name}: unexpected ${JSON.stringify(excess)}`, hint);
	return { flags: checkFlags(command, own), words, options };
}

function commandHelp<F extends Fields>({ name, usage, about, flags, takesOptions, listsOptions }: Command<F>): string {
	const width = helpWidth(process.stdout);
	const own = formatFlags({ ...flags, help: flag("Show this text.") }, width);
	const heading = takesOptions ? "Command" : "Options";
	const parts = [`Usage: ${`${name} ${usage}`.trimEnd()}`, paragraphs(about, width), `${heading}:\n${own}`];
	return `${parts.join("\n\n")}${listsOptions ? `\n${formatOptions(width)}` : ""}`;
}

/** The columns of a help text: those of the terminal, but lines that are not too long to read. */
function helpWidth({ columns }: { columns?: number }): number {
	return Math.min(110, columns || 100);
}

/** Fills the lines of each paragraph of `text` up to `width` columns; indented lines stay as they are. */
function paragraphs(text: string, width: number): string {
	return text.replace(/^[^ \n].*(\n[^ \n].*)*/gm, (lines) => wrap(lines.replaceAll("\n", " "), width).join("\n"));
}

/** A command as a group knows it: loaded only when it is called. */
export interface Entry {
	summary: string;
	load(): Promise<{ COMMAND: Command<Fields>; run(words: readonly string[]): Promise<number> }>;
}

/** Commands under one name. */
export interface Group {
	name: string;
	/** What the commands do together; a line in the help of the group above it. */
	summary: string;
	commands: Readonly<Record<string, Entry | Group>>;
	/** Text of the help after the list of commands, in paragraphs. */
	notes?: string;
}

/** Runs the command of `group` that the first word names; gives the exit code. */
export async function runGroup(group: Group, given: readonly string[]): Promise<number> {
	// `arl help train` is `arl train --help`.
	const [first, ...rest] = given[0] === "help" ? [...given.slice(1), "--help"] : given;
	if (first === undefined) {
		process.stderr.write(groupHelp(group, helpWidth(process.stderr)));
		return EXIT_CODES.ARL_USAGE;
	}
	if (first === "--help" || first === "-h") {
		process.stdout.write(groupHelp(group, helpWidth(process.stdout)));
		return 0;
	}
	const entry = Object.hasOwn(group.commands, first) ? group.commands[first] : undefined;
	if (entry) return "commands" in entry ? runGroup(entry, rest) : (await entry.load()).run(rest);
	const isFlag = first.startsWith("-");
	const near = nearest(first, isFlag ? ["--help"] : Object.keys(group.commands));
	throw new ArlError(
		"ARL_USAGE",
		isFlag ? `unknown option ${first}` : `${group.name} has no command ${JSON.stringify(first)}`,
		near === undefined ? `\`${group.name} --help\` lists the commands.` : `Did you mean ${near}?`,
	);
}

function groupHelp({ name, summary, commands, notes }: Group, columns: number): string {
	const width = Math.max(...Object.keys(commands).map((command) => command.length));
	const lines = Object.entries(commands).map(([command, entry]) => `  ${command.padEnd(width)}  ${entry.summary}`);
	const more = [`\`${name} COMMAND --help\` shows what a command takes.`, ...(notes === undefined ? [] : [notes])];
	const text = `${summary}\n\n${lines.join("\n")}\n\n${more.join("\n\n")}`;
	return `Usage: ${name} COMMAND ...\n\n${paragraphs(text, columns)}\n`;
}

/** The version in package.json, two folders above both `src/cli` and `dist/cli`. */
export function version(): string {
	const text = readFileSync(new URL("../../package.json", import.meta.url), "utf8");
	const { version: found } = JSON.parse(text) as { version?: unknown };
	return typeof found === "string" ? found : "unknown";
}
