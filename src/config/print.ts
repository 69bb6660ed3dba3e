/** How the configuration is displayed: resolved values with their origins, help, and its JSON Schema. */
import { z } from "zod";
import { defaultOf, type Fields, metaOf, type OptionMeta } from "./fields.js";
import type { Resolved } from "./resolve.js";
import { type AgentTrainingConfig, GROUPS, OPTION_NAMES, type OptionName, trainingSchema } from "./schema.js";
import { redact, show, soundsSecret } from "./values.js";

/** Every resolved value with its origin, a line each. */
export function formatResolved({ args, origins }: Resolved): string {
	const rows = OPTION_NAMES.map((name) => ({ name, value: shownValue(name, args[name]), origin: origins[name] }));
	const nameWidth = Math.max(...rows.map(({ name }) => name.length));
	const valueWidth = Math.min(48, Math.max(...rows.map(({ value }) => value.length)));
	return rows
		.map(({ name, value, origin }) => `${name.padEnd(nameWidth)}  ${value.padEnd(valueWidth)}  ${origin}\n`)
		.join("");
}

/** The same as one JSON value: `{ name: { value, origin } }`. */
export function resolvedAsJson({ args, origins }: Resolved): Record<string, { value: unknown; origin: string }> {
	return Object.fromEntries(
		OPTION_NAMES.map((name) => [
			name,
			{ value: isSecret(name) && args[name] !== null ? "***" : args[name], origin: origins[name] },
		]),
	);
}

/** Every option with its value as anyone may see it, and whether it is the default. */
export function shownOptions(args: AgentTrainingConfig): { name: string; value: unknown; isDefault: boolean }[] {
	return OPTION_NAMES.map((name) => {
		const value = args[name];
		const { success, data } = trainingSchema.shape[name].safeParse(undefined);
		const isDefault = success && JSON.stringify(data) === JSON.stringify(value);
		return { name, value: isSecret(name) && value !== null ? "***" : withoutSecrets(value), isDefault };
	});
}

/** The value, in whose texts names and passwords in addresses are hidden. */
function withoutSecrets(value: unknown): unknown {
	if (typeof value === "string") return redact(value);
	if (Array.isArray(value)) return value.map(withoutSecrets);
	if (value === null || typeof value !== "object") return value;
	return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, withoutSecrets(part)]));
}

function isSecret(name: OptionName): boolean {
	return metaOf(trainingSchema.shape[name]).secret === true || soundsSecret(name);
}

function shownValue(name: OptionName, value: unknown): string {
	if (isSecret(name)) return value === null ? "none" : "***";
	if (typeof value === "string") return show(value).slice(1, -1);
	const empty = Array.isArray(value)
		? value.length === 0
		: value !== null && typeof value === "object" && Object.keys(value).length === 0;
	return empty ? "none" : show(value);
}

const ARGUMENT: Readonly<Record<OptionMeta["kind"], string>> = {
	flag: "",
	boolean: "[true|false]",
	integer: "N",
	number: "X",
	string: "TEXT",
	choice: "NAME",
	strings: "TEXT...",
	numbers: "X...",
	map: "NAME=VALUE...",
};

/** How the flag is written. */
function flagUsage(name: string, { kind, expects, switch: isSwitch }: OptionMeta): string {
	const argument = kind === "string" && /folder|file/.test(expects) ? "PATH" : ARGUMENT[kind];
	return `--${name} ${isSwitch && kind !== "boolean" ? `[${argument}]` : argument}`.trimEnd();
}

/** Flags as help shows them, wrapped to `width` columns. */
export function formatFlags(fields: Fields, width: number): string {
	const indent = 6;
	const lines = Object.entries(fields).flatMap(([name, field]) => {
		const meta = metaOf(field);
		const value = defaultOf(field);
		const about = meta.kind === "flag" ? "" : ` Expected: ${meta.expects}.`;
		const otherwise = meta.kind === "flag" ? "" : value === undefined ? " Required." : ` Default: ${value}.`;
		const text = wrap(`${meta.description}${about}${otherwise}`, Math.max(30, width - indent));
		return [`  ${flagUsage(name, meta)}`, ...text.map((line) => " ".repeat(indent) + line)];
	});
	return `${lines.join("\n")}\n`;
}

/** The options of a run as help shows them, in their groups. */
export function formatOptions(width: number): string {
	return Object.entries(GROUPS)
		.map(([group, fields]) => `${group}:\n${formatFlags(fields, width)}`)
		.join("\n");
}

/** Lines of at most `width` columns, broken between words. */
export function wrap(text: string, width: number): string[] {
	const lines: string[] = [];
	let line = "";
	for (const word of text.split(" ")) {
		if (line !== "" && line.length + 1 + word.length > width) {
			lines.push(line);
			line = word;
		} else {
			line = line === "" ? word : `${line} ${word}`;
		}
	}
	if (line !== "") lines.push(line);
	return lines;
}

/** The JSON Schema of a configuration file. */
export function configJsonSchema(): Record<string, unknown> {
	const schema = z.toJSONSchema(trainingSchema, { io: "input" });
	const properties = { $schema: { type: "string" }, ...schema.properties };
	return { title: "arl train", ...schema, properties };
}
