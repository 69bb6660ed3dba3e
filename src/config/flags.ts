/**
 * Command-line words to values of options. What a flag takes is read from its option; a word that is not of the right
 * kind is left as it is, so that the option's schema refuses it with its name and range.
 */
import { ArlError, messageOf } from "../errors.js";
import { ALIASES, NOT_BUILT } from "./compat.js";
import { type Fields, type Kind, metaOf, type OptionMeta, type Values } from "./fields.js";
import { OPTION_NAMES, type OptionName, trainingSchema } from "./schema.js";
import { nearest, show } from "./values.js";

/** The flags of a command. */
export interface FlagSet<F extends Fields = Fields> {
	/** The words that call the command, such as `arl plan`. */
	name: string;
	/** Its flags by name, as options: its own, and those options of a run that it shares. */
	flags: F;
	/** Whether every option of a run is a flag too, under its other names as well; those values are left unchecked. */
	takesOptions?: boolean;
}

/** The parsed command line. */
export interface ParsedFlags {
	/** Values of the command's flags. */
	own: Map<string, unknown>;
	/** Values of the other options of a run, by the names that were written. */
	options: Map<string, unknown>;
	/** Words that belong to no flag. */
	words: string[];
	/** Whether `--help` or `-h` is among them. */
	help: boolean;
}

type FlagShape = Pick<OptionMeta, "kind" | "switch" | "choices" | "literal">;

const isFlag = (word: string) => word.startsWith("--");

/** The options of a run alone, without any flag of a command. */
const OPTIONS: FlagSet = { name: "arl train", flags: {}, takesOptions: true };

/** Parses the words after a command's name. */
export function parseFlags(given: readonly string[], set: FlagSet = OPTIONS): ParsedFlags {
	const { own, options, words, ...parsed }: ParsedFlags = {
		own: new Map(),
		options: new Map(),
		words: [],
		help: false,
	};
	for (let i = 0; i < given.length; ) {
		const word = given[i++] ?? "";
		if (word === "--") {
			words.push(...given.slice(i));
			break;
		}
		if (word === "--help" || word === "-h") {
			parsed.help = true;
			continue;
		}
		if (!isFlag(word)) {
			if (/^-[A-Za-z]/.test(word)) throw unknownFlag(word, set);
			words.push(word);
			continue;
		}
		const equals = word.indexOf("=");
		const name = word.slice(2, equals < 0 ? undefined : equals);
		const values = equals < 0 ? [] : [word.slice(equals + 1)];
		const take = (most: number) => {
			if (equals >= 0) return;
			while (values.length < most && i < given.length && !isFlag(given[i] ?? "")) values.push(given[i++] ?? "");
		};
		const shape = shapeOf(name, set);
		const target = Object.hasOwn(set.flags, name) ? own : options;
		if (shape?.kind === "flag") {
			if (values.length > 0) throw new ArlError("ARL_USAGE", `--${name} takes no value`);
			target.set(name, true);
		} else if (shape) {
			const many = shape.kind === "strings" || shape.kind === "numbers" || shape.kind === "map";
			// A switch takes the next word only if it can be its value: `--bf16 rows.yaml` leaves the file alone.
			if (!shape.switch || takesNext(shape.kind, given[i])) take(many ? Number.POSITIVE_INFINITY : 1);
			if (values.length === 0 && !shape.switch) throw new ArlError("ARL_USAGE", `--${name} needs a value`, helpOf(set));
			const value = values.length === 0 ? true : convert(name, shape, values);
			const earlier = target.get(name);
			target.set(name, Array.isArray(earlier) && Array.isArray(value) ? [...earlier, ...value] : value);
		} else if (set.takesOptions && Object.hasOwn(NOT_BUILT, name)) {
			take(1);
			options.set(name, values.length === 0 ? true : guess(values[0] ?? ""));
		} else {
			const positive = name.startsWith("no_") ? name.slice(3) : "";
			if (!shapeOf(positive, set)?.switch) throw unknownFlag(`--${name}`, set);
			if (values.length > 0)
				throw new ArlError("ARL_USAGE", `--${name} takes no value`, `Write --${positive} true or --${positive} false.`);
			(Object.hasOwn(set.flags, positive) ? own : options).set(positive, false);
		}
	}
	return { ...parsed, own, options, words };
}

/**
 * The values of a command's flags, with the defaults of those that were not given.
 *
 * @throws ArlError `ARL_USAGE` with a line for each value that its option refuses.
 */
export function checkFlags<F extends Fields>(set: FlagSet<F>, given: ReadonlyMap<string, unknown>): Values<F> {
	const values: Record<string, unknown> = {};
	const problems: string[] = [];
	for (const [name, field] of Object.entries(set.flags)) {
		const { success, data } = field.safeParse(given.get(name));
		const { expects, secret } = metaOf(field);
		if (success) values[name] = data;
		else if (!given.has(name)) problems.push(`--${name} is missing: expected ${expects}`);
		else problems.push(`--${name}: ${secret ? "its value" : show(given.get(name))}; expected ${expects}`);
	}
	if (problems.length > 0) throw new ArlError("ARL_USAGE", problems.join("\n"), helpOf(set));
	return values as Values<F>;
}

/** The shape of the flag `name`; undefined: the command has no such flag. */
function shapeOf(name: string, { flags, takesOptions }: FlagSet): FlagShape | undefined {
	const own = Object.hasOwn(flags, name) ? flags[name] : undefined;
	if (own) return metaOf(own);
	if (!takesOptions) return undefined;
	const alias = Object.hasOwn(ALIASES, name) ? ALIASES[name] : undefined;
	if (alias?.kind) return { kind: alias.kind, switch: alias.kind === "boolean" };
	const option = alias?.to ?? name;
	if (!Object.hasOwn(trainingSchema.shape, option)) return undefined;
	return metaOf(trainingSchema.shape[option as OptionName]);
}

function takesNext(kind: Kind, word: string | undefined): boolean {
	if (word === undefined || isFlag(word)) return false;
	return kind !== "boolean" || !/[./]/.test(word);
}

function convert(name: string, shape: FlagShape, values: readonly string[]): unknown {
	const [word = ""] = values;
	switch (shape.kind) {
		case "flag":
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
			return asMap(name, shape, values);
		case "choice":
		case "string":
			// `none` may itself be one of the choices.
			if (isNone(word) && !shape.literal && !shape.choices?.includes(word)) return null;
			return shape.switch ? asBoolean(word) : word;
	}
}

const isNone = (word: string) => word === "none" || word === "None" || word === "null";

function asBoolean(word: string): unknown {
	const lower = word.toLowerCase();
	return lower === "true" ? true : lower === "false" ? false : word;
}

/** The number that `word` writes in decimal; the word itself if it is not a finite number. */
function asNumber(word: string): unknown {
	if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(word)) return word;
	const value = Number(word);
	return Number.isFinite(value) ? value : word;
}

function guess(word: string): unknown {
	return isNone(word) ? null : typeof asBoolean(word) === "boolean" ? asBoolean(word) : asNumber(word);
}

function asMap(name: string, { literal }: FlagShape, words: readonly string[]): unknown {
	const [first = ""] = words;
	if (words.length === 1 && isNone(first)) return {};
	if (first.trimStart().startsWith("{")) {
		try {
			return JSON.parse(words.join(" "));
		} catch (error) {
			const hint = `Write --${name} '{"name": 1}' or --${name} name=1.`;
			throw new ArlError("ARL_USAGE", `--${name}: not JSON: ${messageOf(error)}`, hint);
		}
	}
	const entries = words.map((word): [string, unknown] => {
		const equals = word.indexOf("=");
		if (equals < 1) throw new ArlError("ARL_USAGE", `--${name}: ${JSON.stringify(word)} is not NAME=VALUE`);
		const value = word.slice(equals + 1);
		return [word.slice(0, equals), literal ? value : guess(value)];
	});
	return Object.fromEntries(entries);
}

function unknownFlag(flag: string, set: FlagSet): ArlError {
	const known = [...Object.keys(set.flags), "help"];
	if (set.takesOptions) known.push(...OPTION_NAMES, ...Object.keys(ALIASES), ...Object.keys(NOT_BUILT));
	const switches = known.filter((name) => shapeOf(name, set)?.switch).map((name) => `no_${name}`);
	const near = nearest(flag.replace(/^-+/, ""), [...known, ...switches]);
	return new ArlError("ARL_USAGE", `unknown option ${flag}`, near ? `Did you mean --${near}?` : helpOf(set));
}

function helpOf({ name }: FlagSet): string {
	return `\`${name} --help\` lists every option.`;
}

/** A flag as a shell offers it. */
export interface OfferedFlag {
	/** Without the dashes. */
	name: string;
	description: string;
	/** How many words behind it are its value. `maybe`: the next one, if it can be. */
	takes: "none" | "maybe" | "one" | "many";
	/** The values that there are; empty: any. */
	values: readonly string[];
	/** Whether a value is a path. */
	paths: boolean;
}

/** All flags of a command: its own, then those of the options of a run, each under its first name. */
export function offeredFlags({ flags, takesOptions }: FlagSet): OfferedFlag[] {
	const all: Fields = takesOptions ? { ...flags, ...trainingSchema.shape } : flags;
	const offered = Object.entries(all).map(([name, field]): OfferedFlag => {
		const { kind, switch: isSwitch, choices, description, expects } = metaOf(field);
		const many = kind === "strings" || kind === "numbers" || kind === "map";
		return {
			name,
			description,
			takes: kind === "flag" ? "none" : isSwitch ? "maybe" : many ? "many" : "one",
			values: choices ?? (kind === "boolean" ? ["true", "false"] : []),
			paths: (kind === "string" || kind === "strings") && /folder|file/.test(expects),
		};
	});
	const help: OfferedFlag = {
		name: "help",
		description: "Show what it takes.",
		takes: "none",
		values: [],
		paths: false,
	};
	return [...offered, help];
}
