/**
 * The kinds of options: each builder builds a zod schema and registers what help, flags and errors need, so that a range is
 * written once. Knows no option by name.
 */
import { z } from "zod";

/** How the words after a flag become a value. A `flag` takes none. */
export type Kind = "flag" | "boolean" | "integer" | "number" | "string" | "choice" | "strings" | "numbers" | "map";

/** An option's properties in addition to its type and default. */
export interface OptionMeta {
	kind: Kind;
	/** The values that are accepted, in words: completes "expected ...". */
	expects: string;
	description: string;
	choices?: readonly string[];
	/** The flag needs no value, and `--no_NAME` exists. */
	switch?: boolean;
	/** Words stay as they are written: `none` and numbers are text. */
	literal?: boolean;
	/** Never shown. */
	secret?: boolean;
	/** Accepts one value only, and refuses every other with the reason. */
	fixed?: boolean;
}

/** Options by their names. */
export type Fields = Readonly<Record<string, z.ZodType>>;

/** The values of options, all checked and with their defaults. */
export type Values<F extends Fields> = { [Name in keyof F]: z.output<F[Name]> };

const optionRegistry = z.registry<OptionMeta>();

type About = Pick<OptionMeta, "description" | "literal"> & { expects?: string };

function register<T extends z.ZodType>(schema: T, meta: OptionMeta): T {
	const described = schema.describe(meta.description);
	optionRegistry.add(described, meta);
	return described;
}

/** The properties of an option; the builders of this file register those of every one. */
export function metaOf(field: z.ZodType): OptionMeta {
	const meta = optionRegistry.get(field);
	if (!meta) throw new Error("an option was not built by a builder");
	return meta;
}

/** An option's default as help shows it; undefined: the option is required. */
export function defaultOf(field: z.ZodType): string | undefined {
	const { success, data } = field.safeParse(undefined);
	if (!success) return undefined;
	const empty = data === null || (typeof data === "object" && Object.keys(data).length === 0);
	return empty ? "none" : String(data);
}

/** Bounds of a number: `min` and `max` are themselves allowed, `above` and `below` are not. */
export interface Bounds {
	min?: number;
	above?: number;
	max?: number;
	below?: number;
}

function boundsText(noun: string, { min, above, max, below }: Bounds): string {
	const low = min !== undefined ? `${min} or more` : above !== undefined ? `above ${above}` : "";
	const high = max !== undefined ? `at most ${max}` : below !== undefined ? `below ${below}` : "";
	return [noun, [low, high].filter((part) => part !== "").join(" and ")].filter((part) => part !== "").join(", ");
}

function bounded(schema: z.ZodNumber, { min, above, max, below }: Bounds): z.ZodNumber {
	let result = schema;
	if (min !== undefined) result = result.min(min);
	if (above !== undefined) result = result.gt(above);
	if (max !== undefined) result = result.max(max);
	if (below !== undefined) result = result.lt(below);
	return result;
}

/** A switch of a command: off unless it is given, and without a value. */
export function flag(description: string) {
	return register(z.boolean().default(false), { description, kind: "flag", expects: "no value" });
}

/** A finite number within bounds. */
export function number(about: About & Bounds & { default: number }) {
	const expects = about.expects ?? boundsText("a number", about);
	return register(bounded(z.number(), about).default(about.default), { ...about, kind: "number", expects });
}

/** A number, or none. */
export function numberOrNone(about: About & Bounds) {
	const expects = `${about.expects ?? boundsText("a number", about)}; or none`;
	return register(bounded(z.number(), about).nullable().default(null), { ...about, kind: "number", expects });
}

/** A whole number within bounds. */
export function integer(about: About & Bounds & { default: number }) {
	const expects = about.expects ?? boundsText("a whole number", about);
	return register(bounded(z.int(), about).default(about.default), { ...about, kind: "integer", expects });
}

/** A whole number, or none. */
export function integerOrNone(about: About & Bounds) {
	const expects = `${about.expects ?? boundsText("a whole number", about)}; or none`;
	return register(bounded(z.int(), about).nullable().default(null), { ...about, kind: "integer", expects });
}

/** A number of steps, or, below 1, a part of all steps (as in transformers 5). */
export function stepsOrRatio(about: About & { zero: boolean; default: number }) {
	const low = about.zero ? "0, " : "";
	const expects = `${low}a whole number of steps, or a part of all steps (above 0 and below 1)`;
	const schema = z
		.number()
		.min(0)
		.refine((value) => (value === 0 ? about.zero : value < 1 || Number.isSafeInteger(value)));
	return register(schema.default(about.default), { ...about, kind: "number", expects });
}

/** Yes or no. */
export function boolean(about: About & { default: boolean }) {
	const meta: OptionMeta = { ...about, kind: "boolean", expects: "true or false", switch: true };
	return register(z.boolean().default(about.default), meta);
}

const text = z.string().min(1);
const TEXT = "a text that is not empty";

/** A required text. */
export function requiredString(about: About) {
	return register(text, { ...about, kind: "string", expects: about.expects ?? TEXT });
}

/** A text with a default. */
export function string(about: About & { default: string; pattern?: RegExp }) {
	const schema = about.pattern ? text.regex(about.pattern) : text;
	return register(schema.default(about.default), { ...about, kind: "string", expects: about.expects ?? TEXT });
}

/** A text, or none. */
export function stringOrNone(about: About & { default?: string; secret?: true }) {
	const expects = `${about.expects ?? TEXT}; or none`;
	return register(text.nullable().default(about.default ?? null), { ...about, kind: "string", expects });
}

/** One of a fixed set. */
export function choice<const T extends readonly [string, ...string[]]>(
	choices: T,
	about: About & { default: T[number] },
) {
	const expects = `one of ${choices.join(", ")}`;
	return register(z.enum(choices).default(about.default as never), { ...about, kind: "choice", expects, choices });
}

/** Some of a fixed set, empty by default; one alone is read as a list of one, and `none` as an empty list. */
export function choices<const T extends readonly [string, ...string[]]>(names: T, about: About) {
	type One = "none" | T[number];
	// The type of `z.enum` over a generic tuple does not compile where a user checks the types of packages.
	const one = z.enum(["none", ...names]) as unknown as z.ZodType<One, One>;
	const schema = z
		.union([one, z.array(one)])
		.default([])
		.transform((value) => [value].flat().filter((name) => name !== "none") as T[number][]);
	const expects = `one or several of ${names.join(", ")}; or none`;
	return register(schema, { ...about, kind: "strings", expects });
}

/** One of a fixed set, or none. */
export function choiceOrNone<const T extends readonly [string, ...string[]]>(choices: T, about: About) {
	const expects = `one of ${choices.join(", ")}; or none`;
	return register(z.enum(choices).nullable().default(null), { ...about, kind: "choice", expects, choices });
}

/** A list of texts, empty by default; one text alone is read as a list of one. */
export function strings(about: About) {
	const schema = z
		.union([text, z.array(text)])
		.default([])
		.transform((value) => (typeof value === "string" ? [value] : value));
	return register(schema, { ...about, kind: "strings", expects: about.expects ?? "one text or several" });
}

/** A list of numbers above 0; empty: none. */
export function weights(about: About) {
	const expects = "numbers above 0, one for each entry";
	return register(z.array(z.number().gt(0)).default([]), { ...about, kind: "numbers", expects });
}

/** A list of whole numbers above 0, some of which may be none; empty: none at all. */
export function caps(about: About) {
	const cap = z.union([z.int().min(1), z.null(), z.literal("none").transform(() => null)]);
	const schema = z
		.union([cap, z.array(cap)])
		.default([])
		.transform((value): (number | null)[] => (Array.isArray(value) ? value : value === null ? [] : [value]));
	const expects = "whole numbers of 1 or more, or none, one for each entry";
	return register(schema, { ...about, kind: "numbers", expects });
}

const scalar = z.union([z.string(), z.number(), z.boolean(), z.null()]);

/** Names with texts or numbers. */
export function map<T extends z.ZodType = typeof scalar>(about: About, value?: T) {
	const expects = about.expects ?? "names and values, as JSON or as NAME=VALUE ...";
	return register(z.record(z.string(), (value ?? scalar) as T).default({}), { ...about, kind: "map", expects });
}

/** An option of which one value is built; the others are known, and refused with the reason. */
export function only<const T extends string | number | boolean>(
	allowed: T,
	{ description, why }: { description: string; why: string },
) {
	const kinds = { string: "choice", number: "integer", boolean: "boolean" } as const;
	const kind = kinds[typeof allowed as keyof typeof kinds];
	return register(z.literal(allowed).default(allowed as never), {
		description,
		kind,
		expects: `${allowed} (${why})`,
		fixed: true,
		...(kind === "choice" && { choices: [String(allowed)] }),
		...(kind === "boolean" && { switch: true }),
	});
}

/** An option of any other type. */
export function custom<T extends z.ZodType>(schema: T, meta: OptionMeta): T {
	return register(schema, meta);
}

/** The same option, described as another command uses it. */
export function described<T extends z.ZodType>(field: T, description: string): T {
	return register(field, { ...metaOf(field), description });
}

/** The same list for a command that needs at least one entry. */
export function required<T extends z.ZodType<readonly unknown[]>>(field: T, description: string): T {
	return register(
		field.refine((list) => list.length > 0),
		{ ...metaOf(field), description },
	);
}

/** The same option for a command whose default is none. */
export function orNone<T extends z.ZodType>(field: z.ZodDefault<T>, description: string) {
	const meta = metaOf(field);
	const expects = `${meta.expects}; or none`;
	return register(field.unwrap().nullable().default(null), { ...meta, description, expects });
}
