/**
 * The kinds of options: each builder makes a zod schema together with what help, flags and errors need to know of it,
 * so that a range is written once. Knows no option by name.
 */
import { z } from "zod";

/** How the words after a flag become a value. */
export type Kind = "boolean" | "integer" | "number" | "string" | "choice" | "strings" | "numbers" | "map";

/** What is known of an option beside its type. */
export interface OptionMeta {
	group: string;
	kind: Kind;
	/** What a value may be, in words: completes "expected ...". */
	expects: string;
	description: string;
	/** The default as it is shown; absent: the option must be given. */
	default?: string;
	choices?: readonly string[];
	/** The flag may stand without a value, and `--no_NAME` exists. */
	switch?: boolean;
	/** Never shown. */
	secret?: boolean;
	/** Has one value only; every other is refused. */
	fixed?: boolean;
}

/** What the schema's fields are registered with. */
export const optionRegistry = z.registry<OptionMeta>();

type About = Pick<OptionMeta, "group" | "description"> & { expects?: string };

function register<T extends z.ZodType>(schema: T, meta: OptionMeta): T {
	const described = schema.describe(meta.description);
	optionRegistry.add(described, meta);
	return described;
}

function shown(value: unknown): string {
	if (value === null) return "none";
	return typeof value === "string" ? value : JSON.stringify(value);
}

/** Bounds of a number: `min` and `max` are allowed themselves, `above` and `below` are not. */
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

/** A finite number within bounds. */
export function number(about: About & Bounds & { default: number }) {
	const expects = about.expects ?? boundsText("a number", about);
	const meta: OptionMeta = { ...pick(about), kind: "number", expects, default: shown(about.default) };
	return register(bounded(z.number(), about).default(about.default), meta);
}

/** A number, or none. */
export function numberOrNone(about: About & Bounds) {
	const expects = `${about.expects ?? boundsText("a number", about)}; or none`;
	return register(bounded(z.number(), about).nullable().default(null), {
		...pick(about),
		kind: "number",
		expects,
		default: "none",
	});
}

/** A whole number within bounds. */
export function integer(about: About & Bounds & { default: number }) {
	const expects = about.expects ?? boundsText("a whole number", about);
	const meta: OptionMeta = { ...pick(about), kind: "integer", expects, default: shown(about.default) };
	return register(bounded(z.int(), about).default(about.default), meta);
}

/** A whole number, or none. */
export function integerOrNone(about: About & Bounds) {
	const expects = `${about.expects ?? boundsText("a whole number", about)}; or none`;
	return register(bounded(z.int(), about).nullable().default(null), {
		...pick(about),
		kind: "integer",
		expects,
		default: "none",
	});
}

/** A number of steps, or, below 1, a part of all steps (as in transformers 5). */
export function stepsOrRatio(about: About & { zero: boolean; default: number }) {
	const low = about.zero ? "0, " : "";
	const expects = `${low}a whole number of steps, or a part of all steps (above 0 and below 1)`;
	const schema = z
		.number()
		.min(0)
		.refine((value) => (value === 0 ? about.zero : value < 1 || Number.isSafeInteger(value)));
	return register(schema.default(about.default), {
		...pick(about),
		kind: "number",
		expects,
		default: shown(about.default),
	});
}

/** Yes or no. */
export function boolean(about: About & { default: boolean }) {
	return register(z.boolean().default(about.default), {
		...pick(about),
		kind: "boolean",
		expects: "true or false",
		default: shown(about.default),
		switch: true,
	});
}

const text = z.string().min(1);

/** A text that must be given. */
export function requiredString(about: About) {
	return register(text, { ...pick(about), kind: "string", expects: about.expects ?? "a text that is not empty" });
}

/** A text with a default. */
export function string(about: About & { default: string; pattern?: RegExp }) {
	const expects = about.expects ?? "a text that is not empty";
	const schema = about.pattern ? text.regex(about.pattern) : text;
	return register(schema.default(about.default), {
		...pick(about),
		kind: "string",
		expects,
		default: about.default,
	});
}

/** A text, or none. */
export function stringOrNone(about: About & { default?: string }) {
	const expects = `${about.expects ?? "a text that is not empty"}; or none`;
	const meta: OptionMeta = { ...pick(about), kind: "string", expects, default: shown(about.default ?? null) };
	return register(text.nullable().default(about.default ?? null), meta);
}

/** A text that is never shown, or none. */
export function secretOrNone(about: About & { expects: string }) {
	const expects = `${about.expects}; or none`;
	const meta: OptionMeta = { ...pick(about), kind: "string", expects, default: "none", secret: true };
	return register(text.nullable().default(null), meta);
}

/** One of a fixed set. */
export function choice<const T extends readonly [string, ...string[]]>(
	values: T,
	about: About & { default: T[number] },
) {
	const meta: OptionMeta = {
		...pick(about),
		kind: "choice",
		expects: `one of ${values.join(", ")}`,
		default: about.default,
		choices: values,
	};
	return register(z.enum(values).default(about.default as never), meta);
}

/** One of a fixed set, or none. */
export function choiceOrNone<const T extends readonly [string, ...string[]]>(values: T, about: About) {
	const meta: OptionMeta = {
		...pick(about),
		kind: "choice",
		expects: `one of ${values.join(", ")}; or none`,
		default: "none",
		choices: values,
	};
	return register(z.enum(values).nullable().default(null), meta);
}

/** A list of texts; one text alone stands for a list of one. */
export function strings(about: About) {
	const schema = z
		.union([text, z.array(text)])
		.default([])
		.transform((value) => (typeof value === "string" ? [value] : value));
	const expects = about.expects ?? "one text or several";
	return register(schema, { ...pick(about), kind: "strings", expects, default: "none" });
}

/** A list of numbers above 0; empty: none. */
export function weights(about: About) {
	return register(z.array(z.number().gt(0)).default([]), {
		...pick(about),
		kind: "numbers",
		expects: "numbers above 0, one for each entry",
		default: "none",
	});
}

/** A list of whole numbers above 0, some of which may be none; empty: none at all. */
export function caps(about: About) {
	const cap = z.union([z.int().min(1), z.null(), z.literal("none").transform(() => null)]);
	const schema = z
		.union([cap, z.array(cap)])
		.default([])
		.transform((value): (number | null)[] => (Array.isArray(value) ? value : value === null ? [] : [value]));
	return register(schema, {
		...pick(about),
		kind: "numbers",
		expects: "whole numbers of 1 or more, or none, one for each entry",
		default: "none",
	});
}

const scalar = z.union([z.string(), z.number(), z.boolean(), z.null()]);

/** Names with texts or numbers. */
export function map<T extends z.ZodType = typeof scalar>(about: About, value?: T) {
	return register(z.record(z.string(), (value ?? scalar) as T).default({}), {
		...pick(about),
		kind: "map",
		expects: about.expects ?? "names and values, as JSON or as NAME=VALUE ...",
		default: "none",
	});
}

/**
 * An option of which only some values are built; the others are known, and refused with the reason. It reads like any
 * other in every other respect.
 */
export function only<const T extends string | number | boolean>(
	allowed: T,
	about: About & { kind: Kind; why: string; others?: readonly string[]; switch?: boolean },
) {
	const choices = about.others ? { choices: [String(allowed), ...about.others] } : {};
	const flags = about.kind === "boolean" ? { switch: true } : {};
	return register(z.literal(allowed).default(allowed as never), {
		...pick(about),
		...choices,
		...flags,
		kind: about.kind,
		fixed: true,
		expects: `${allowed} (${about.why})`,
		default: String(allowed),
	});
}

/** A field of one's own making. */
export function custom<T extends z.ZodType>(schema: T, meta: OptionMeta): T {
	return register(schema, meta);
}

function pick({ group, description }: About): { group: string; description: string } {
	return { group, description };
}
