/** What is shown of the configuration: resolved values with their origin, help, JSON Schema, and the table for docs/. */
import { z } from "zod";
import { ALIASES, NOT_BUILT } from "./compat.js";
import { type OptionMeta, optionRegistry } from "./fields.js";
import type { Resolved } from "./resolve.js";
import { GROUPS, OPTION_NAMES, type OptionName, trainingSchema } from "./schema.js";
import { show, soundsSecret } from "./values.js";

/** What is known of an option; every field of the schema is registered. */
export function optionMeta(name: OptionName): OptionMeta {
	const meta = optionRegistry.get(trainingSchema.shape[name]);
	if (!meta) throw new Error(`option ${name} is not registered`);
	return meta;
}

function namesOf(group: string): OptionName[] {
	return OPTION_NAMES.filter((name) => optionMeta(name).group === group);
}

/** Every resolved value and where it comes from, a line each. */
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

function isSecret(name: OptionName): boolean {
	return optionMeta(name).secret === true || soundsSecret(name);
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
function flagUsage(name: OptionName): string {
	const meta = optionMeta(name);
	const argument = meta.kind === "string" && /folder|file/.test(meta.expects) ? "PATH" : ARGUMENT[meta.kind];
	const optional = meta.switch === true && meta.kind !== "boolean";
	return `--${name} ${optional ? `[${argument}]` : argument}`;
}

/** The options' part of `arl train --help`, wrapped to `width` columns. */
export function formatHelp(width: number): string {
	const indent = 6;
	const lines: string[] = [];
	for (const group of GROUPS) {
		lines.push(`${group}:`);
		for (const name of namesOf(group)) {
			const meta = optionMeta(name);
			lines.push(`  ${flagUsage(name)}`);
			const about = `${meta.description} Expected: ${meta.expects}.${meta.default === undefined ? " Required." : ` Default: ${meta.default}.`}`;
			lines.push(...wrap(about, Math.max(30, width - indent)).map((line) => " ".repeat(indent) + line));
		}
		lines.push("");
	}
	return lines.join("\n");
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

/** The page of options in docs/, in Markdown. */
export function optionsMarkdown(): string {
	const lines = [
		"# Options of `arl train`",
		"",
		"This page is generated from the schema (`npm run docs:options`). An option has one spelling everywhere: as a flag",
		"(`--learning_rate 1e-4`), in YAML or JSON, in `arl.config.ts`, and in code. A flag wins over a file's value, and that over",
		"the default. `arl train --print_config` shows every value and where it comes from. A switch needs no value",
		"(`--bf16`), with a value (`--bf16 false`), or with `no_` (`--no_bf16`). `none` unsets an option that may be unset.",
	];
	for (const group of GROUPS) {
		lines.push("", `## ${group}`, "", "| option | expected | default | what it does |", "|---|---|---|---|");
		for (const name of namesOf(group)) {
			const meta = optionMeta(name);
			const cells = [
				`\`${name}\``,
				meta.expects,
				meta.default === undefined ? "required" : `\`${meta.default}\``,
				meta.description,
			];
			lines.push(`| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`);
		}
	}
	lines.push(
		"",
		"## Older names",
		"",
		"Read as the option next to them, with a notice.",
		"",
		"| name | read as |",
		"|---|---|",
	);
	for (const [name, { to }] of Object.entries(ALIASES)) lines.push(`| \`${name}\` | \`${to}\` |`);
	lines.push(
		"",
		"## Known and not built",
		"",
		"Names of Hugging Face's TrainingArguments, TRL's SFTConfig and AgentRL that this program refuses with the reason. A value",
		"that only says what happens anyway is taken, so that a configuration from there needs few changes.",
		"",
		"| names | why | values that are taken |",
		"|---|---|---|",
	);
	for (const [why, names] of groupByReason()) {
		const taken = names.flatMap(({ name, neutral }) =>
			neutral.length > 0 ? [`\`${name}\` ${neutral.map(takenText).join(", ")}`] : [],
		);
		lines.push(`| ${names.map(({ name }) => `\`${name}\``).join(", ")} | ${why} | ${taken.join("; ")} |`);
	}
	return `${lines.join("\n")}\n`;
}

function takenText(value: unknown): string {
	return value === "" ? "(empty)" : value === null ? "none" : String(value);
}

function groupByReason(): Map<string, { name: string; neutral: readonly unknown[] }[]> {
	const groups = new Map<string, { name: string; neutral: readonly unknown[] }[]>();
	for (const [name, { why, neutral }] of Object.entries(NOT_BUILT)) {
		groups.set(why, [...(groups.get(why) ?? []), { name, neutral }]);
	}
	return groups;
}
