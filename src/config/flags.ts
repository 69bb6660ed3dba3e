/**
 * Command-line words to values of options. What each flag takes is read from the schema; a word that is not of the right
 * kind is left as it is, so that the schema refuses it with the option's name and range.
 */
import { ArlError, messageOf } from "../errors.js";
import { ALIASES, NOT_BUILT } from "./compat.js";
import { type Kind, optionRegistry } from "./fields.js";
import { OPTION_NAMES, type OptionName, trainingSchema } from "./schema.js";
import { nearest } from "./values.js";

/** Flags that belong to a command itself: with a value, or a switch. */
export type CommandFlags = Readonly<Record<string, "value" | "switch">>;

/** The parsed command line. */
export interface ParsedFlags {
	/** Options of the configuration, aliases and known foreign names included. */
	options: Map<string, unknown>;
	/** The command's own flags. */
	command: Map<string, string | true>;
	/** Words that belong to no flag. */
	positional: string[];
}

interface FlagShape {
	kind: Kind;
	/** May stand without a value, and `--no_NAME` exists. */
	switch: boolean;
}

/** What the flag `name` takes; undefined: no option of that name. */
function flagShape(name: string): FlagShape | undefined {
	const alias = Object.hasOwn(ALIASES, name) ? ALIASES[name] : undefined;
	if (alias?.kind) return { kind: alias.kind, switch: alias.kind === "boolean" };
	const option = alias?.to ?? name;
	if (!Object.hasOwn(trainingSchema.shape, option)) return undefined;
	const meta = optionRegistry.get(trainingSchema.shape[option as OptionName]);
	return meta && { kind: meta.kind, switch: meta.switch === true };
}

const isFlag = (word: string) => word.startsWith("--") && word.length > 2;

/** Parses the words after `arl COMMAND`. */
export function parseFlags(words: readonly string[], own: CommandFlags = {}): ParsedFlags {
	const parsed: ParsedFlags = { options: new Map(), command: new Map(), positional: [] };
	for (let i = 0; i < words.length; ) {
		const word = words[i++] ?? "";
		if (!isFlag(word)) {
			if (/^-[A-Za-z]/.test(word)) throw unknownFlag(word, own);
			parsed.positional.push(word);
			continue;
		}
		const equals = word.indexOf("=");
		const name = word.slice(2, equals < 0 ? undefined : equals);
		const values = equals < 0 ? [] : [word.slice(equals + 1)];
		const take = (most: number) => {
			if (equals >= 0) return;
			while (values.length < most && i < words.length && !isFlag(words[i] ?? "")) values.push(words[i++] ?? "");
		};
		if (Object.hasOwn(own, name)) {
			if (own[name] === "switch") {
				if (values.length > 0) throw new ArlError("ARL_USAGE", `--${name} takes no value`);
				parsed.command.set(name, true);
				continue;
			}
			take(1);
			parsed.command.set(name, one(name, values));
			continue;
		}
		const shape = flagShape(name);
		if (shape) {
			const many = shape.kind === "strings" || shape.kind === "numbers" || shape.kind === "map";
			// A switch takes the next word only if it can be its value: `--bf16 rows.yaml` leaves the file alone.
			if (!shape.switch || takesNext(shape.kind, words[i])) take(many ? Number.POSITIVE_INFINITY : 1);
			const value = shape.switch && values.length === 0 ? true : convert(name, shape.kind, values);
			const earlier = parsed.options.get(name);
			const appended = Array.isArray(earlier) && Array.isArray(value) ? [...earlier, ...value] : value;
			parsed.options.set(name, appended);
			continue;
		}
		if (Object.hasOwn(NOT_BUILT, name)) {
			take(1);
			parsed.options.set(name, values.length === 0 ? true : guess(values[0] ?? ""));
			continue;
		}
		const positive = name.startsWith("no_") ? name.slice(3) : "";
		if (flagShape(positive)?.switch) {
			if (values.length > 0)
				throw new ArlError("ARL_USAGE", `--${name} takes no value`, `Write --${positive} true or --${positive} false.`);
			parsed.options.set(positive, false);
			continue;
		}
		throw unknownFlag(`--${name}`, own);
	}
	return parsed;
}

function takesNext(kind: Kind, word: string | undefined): boolean {
	if (word === undefined || isFlag(word)) return false;
	return kind !== "boolean" || !/[./]/.test(word);
}

function one(name: string, values: readonly string[]): string {
	const [value] = values;
	if (value === undefined || value === "") throw new ArlError("ARL_USAGE", `--${name} needs a value`);
	return value;
}

function convert(name: string, kind: Kind, values: readonly string[]): unknown {
	if (values.length === 0)
		throw new ArlError("ARL_USAGE", `--${name} needs a value`, "`arl train --help` lists what each option takes.");
	const [word = ""] = values;
	switch (kind) {
		case "boolean":
			return asBoolean(word);
		case "integer":
		case "number":
			return isNone(word) ? null : asNumber(word);
		case "numbers":
			return values.length === 1 && isNone(word) ? [] : values.map(asNumber);
		case "strings":
			return [...values];
		case "map":
			return asMap(name, values);
		case "choice":
			if (isNone(word) && !isChoice(name, word)) return null;
			return word === "true" || word === "false" ? word === "true" : word;
		case "string":
			if (isNone(word)) return null;
			return name === "resume_from_checkpoint" ? asBoolean(word) : word;
	}
}

/** `none` may itself be one of the choices. */
function isChoice(name: string, word: string): boolean {
	const option = Object.hasOwn(ALIASES, name) ? ALIASES[name]?.to : name;
	const schema = option && Object.hasOwn(trainingSchema.shape, option) && trainingSchema.shape[option as OptionName];
	return (schema && optionRegistry.get(schema)?.choices?.includes(word)) === true;
}

const isNone = (word: string) => word === "none" || word === "None" || word === "null";

function asBoolean(word: string): unknown {
	const lower = word.toLowerCase();
	return lower === "true" ? true : lower === "false" ? false : word;
}

/** The number that `word` writes in decimal; the word itself where it writes none that is finite. */
function asNumber(word: string): unknown {
	if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(word)) return word;
	const value = Number(word);
	return Number.isFinite(value) ? value : word;
}

function guess(word: string): unknown {
	return isNone(word) ? null : typeof asBoolean(word) === "boolean" ? asBoolean(word) : asNumber(word);
}

function asMap(name: string, words: readonly string[]): unknown {
	const [first = ""] = words;
	if (words.length === 1 && isNone(first)) return {};
	if (first.trimStart().startsWith("{")) {
		try {
			return JSON.parse(words.join(" "));
		} catch (error) {
			const reason = messageOf(error);
			throw new ArlError(
				"ARL_USAGE",
				`--${name}: not JSON: ${reason}`,
				`Write --${name} '{"name": 1}' or --${name} name=1.`,
			);
		}
	}
	const entries = words.map((word): [string, unknown] => {
		const equals = word.indexOf("=");
		if (equals < 1) throw new ArlError("ARL_USAGE", `--${name}: ${JSON.stringify(word)} is not NAME=VALUE`);
		const value = word.slice(equals + 1);
		return [word.slice(0, equals), name === "columns" ? value : guess(value)];
	});
	return Object.fromEntries(entries);
}

function unknownFlag(flag: string, own: CommandFlags): ArlError {
	const name = flag.replace(/^-+/, "");
	const near = nearest(name, [
		...OPTION_NAMES,
		...Object.keys(own),
		...Object.keys(ALIASES),
		...Object.keys(NOT_BUILT),
	]);
	const hint = near ? `Did you mean --${near}?` : "`arl train --help` lists every option.";
	return new ArlError("ARL_USAGE", `unknown option ${flag}`, hint);
}
