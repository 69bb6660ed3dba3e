/**
 * What a shell offers next: commands, flags and values out of the one table of commands and options. The scripts of
 * `completion-scripts.ts` call it at each Tab, as `arl __complete SHELL =CURRENT WORD...`.
 */
import { type Fields, type OfferedFlag, offeredFlags } from "../config/index.js";
import type { Command, Entry, Group } from "./command.js";

/** A word that fits, and what it means. */
export interface Candidate {
	word: string;
	about: string;
}

/** What fits at the cursor. `paths`: files and folders fit as well, which the shell itself finds. */
export interface Offer {
	candidates: Candidate[];
	paths: boolean;
}

const NOTHING: Offer = { candidates: [], paths: false };

/** What fits in place of `current`, behind `before`. */
export async function offer(root: Group, before: readonly string[], current: string): Promise<Offer> {
	let group = root;
	for (const [i, word] of before.entries()) {
		if (word === "help" && i === 0) continue;
		const entry = Object.hasOwn(group.commands, word) ? group.commands[word] : undefined;
		if (entry === undefined) return NOTHING;
		if ("load" in entry) return before[0] === "help" ? NOTHING : offerOf(entry, before.slice(i + 1), current);
		group = entry;
	}
	const commands = Object.entries(group.commands).map(([word, { summary }]) => ({ word, about: summary }));
	const more = [
		...(before.length === 0 ? [{ word: "help", about: "Show what a command takes." }] : []),
		...(current.startsWith("-") ? [{ word: "--help", about: "Show the commands." }] : []),
		...(current.startsWith("-") && group === root ? [{ word: "--version", about: "Print the version." }] : []),
	];
	return { candidates: fitting([...commands, ...more], current), paths: false };
}

async function offerOf(entry: Entry, before: readonly string[], current: string): Promise<Offer> {
	const { COMMAND } = await entry.load();
	const flags = offeredFlags(COMMAND);
	if (before.includes("--")) return words(COMMAND, current);
	const equals = current.indexOf("=");
	if (current.startsWith("--") && equals > 0) {
		const open = named(flags, current.slice(0, equals));
		const { candidates } = open ? valuesOf(open, current.slice(equals + 1)) : NOTHING;
		const whole = candidates.map(({ word, about }) => ({ word: `${current.slice(0, equals + 1)}${word}`, about }));
		return { candidates: whole, paths: open?.paths ?? false };
	}
	if (current.startsWith("-")) return { candidates: flagsFor(flags, before, current), paths: false };
	const { open, taken } = openFlag(flags, before);
	if (open?.takes === "many" || (open?.takes === "one" && taken === 0)) return valuesOf(open, current);
	const positional = words(COMMAND, current);
	if (open?.takes !== "maybe" || taken > 0) return positional;
	const { candidates } = valuesOf(open, current);
	return { candidates: [...candidates, ...positional.candidates], paths: positional.paths };
}

/** The last flag before the cursor, and how many words follow it. */
function openFlag(flags: readonly OfferedFlag[], before: readonly string[]): { open?: OfferedFlag; taken: number } {
	const at = before.findLastIndex((word) => word.startsWith("--"));
	const word = before[at];
	if (word === undefined || word.includes("=")) return { taken: 0 };
	const open = named(flags, word);
	return { ...(open && { open }), taken: before.length - at - 1 };
}

function named(flags: readonly OfferedFlag[], word: string): OfferedFlag | undefined {
	return flags.find(({ name }) => `--${name}` === word);
}

/** The flags that are not on the line yet; those that negate a switch only once `--no` is typed. */
function flagsFor(flags: readonly OfferedFlag[], before: readonly string[], current: string): Candidate[] {
	const given = new Set(before.map((word) => word.split("=", 1)[0]));
	const all = flags.flatMap(({ name, description, takes }) => [
		{ word: `--${name}`, about: description },
		...(takes === "maybe" && current.startsWith("--no")
			? [{ word: `--no_${name}`, about: `Not: ${description}` }]
			: []),
	]);
	return fitting(all, current).filter(({ word }) => !given.has(word));
}

function valuesOf({ values, paths }: OfferedFlag, current: string): Offer {
	return {
		candidates: fitting(
			values.map((word) => ({ word, about: "" })),
			current,
		),
		paths,
	};
}

function words({ words: taken }: Command<Fields>, current: string): Offer {
	if (taken === undefined) return NOTHING;
	const candidates = fitting(
		(taken.choices ?? []).map((word) => ({ word, about: "" })),
		current,
	);
	return { candidates, paths: taken.choices === undefined };
}

function fitting(candidates: readonly Candidate[], current: string): Candidate[] {
	return candidates.filter(({ word }) => word.startsWith(current));
}

/** How each shell reads a candidate. */
const LINES: Readonly<Record<string, (candidate: Candidate) => string>> = {
	bash: ({ word }) => word,
	// zsh separates word and description by a colon.
	zsh: ({ word, about }) => (about === "" ? word.replaceAll(":", "\\:") : `${word.replaceAll(":", "\\:")}:${about}`),
	fish: ({ word, about }) => `${word}\t${about}`,
	powershell: ({ word, about }) => `${word}\t${about}`,
};

const ABOUT_CHARACTERS = 80;

/**
 * The answer to a completion script that has called with `words`: a first line `paths` or `words`, then a line for each
 * candidate.
 */
export async function complete(root: Group, [shell = "", marked = "=", ...before]: readonly string[]): Promise<string> {
	const { candidates, paths } = await offer(root, before, marked.slice(1));
	const line = LINES[shell] ?? (({ word }: Candidate) => word);
	const lines = candidates.map(({ word, about }) => line({ word, about: firstSentence(about) }));
	return `${[paths ? "paths" : "words", ...lines].join("\n")}\n`;
}

function firstSentence(text: string): string {
	const [first = ""] = text.replaceAll(/[\t\n]/g, " ").split(/(?<=\.) /, 1);
	return first.length > ABOUT_CHARACTERS ? `${first.slice(0, ABOUT_CHARACTERS - 3)}...` : first;
}
