/** What `npm run docs:options` generates from the schema: the page of options in docs/, and the documented type of options. */
import { ALIASES, NOT_BUILT } from "./compat.js";
import { defaultOf, metaOf } from "./fields.js";
import { configJsonSchema, wrap } from "./print.js";
import { GROUPS } from "./schema.js";

/** The page of options in docs/, in Markdown. */
export function optionsMarkdown(): string {
	const lines = [
		"# Options of `arl train`",
		"",
		"This page is generated from the schema (`npm run docs:options`). An option has one spelling everywhere: as a flag",
		"(`--learning_rate 1e-4`), in YAML or JSON, in `arl.config.ts`, and in code. A flag wins over a file's value, and that over",
		"the default. `arl train --print_config` shows every value and where it comes from. A switch needs no value",
		"(`--bf16`), but may have one (`--bf16 false`) or be negated (`--no_bf16`). `none` unsets an option that may be unset.",
	];
	for (const [group, fields] of Object.entries(GROUPS)) {
		lines.push("", `## ${group}`, "", "| option | expected | default | what it does |", "|---|---|---|---|");
		for (const [name, field] of Object.entries(fields)) {
			const { expects, description } = metaOf(field);
			const value = defaultOf(field);
			const cells = [`\`${name}\``, expects, value === undefined ? "required" : `\`${value}\``, description];
			lines.push(`| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`);
		}
	}
	lines.push(
		"",
		"## Older names",
		"",
		"Each is read as the option next to it, with a notice.",
		"",
		"| name | read as |",
		"|---|---|",
	);
	for (const [name, { to }] of Object.entries(ALIASES)) lines.push(`| \`${name}\` | \`${to}\` |`);
	lines.push(
		"",
		"## Known and not built",
		"",
		"Options of Hugging Face's TrainingArguments, TRL's SFTConfig and AgentRL that this program refuses with the reason. It",
		"accepts a value that asks for what happens anyway, so that a configuration from there needs few changes.",
		"",
		"| names | why | accepted values |",
		"|---|---|---|",
	);
	for (const [why, names] of groupByReason()) {
		const accepted = names.flatMap(({ name, neutral }) =>
			neutral.length > 0 ? [`\`${name}\` ${neutral.map(acceptedText).join(", ")}`] : [],
		);
		lines.push(`| ${names.map(({ name }) => `\`${name}\``).join(", ")} | ${why} | ${accepted.join("; ")} |`);
	}
	return `${lines.join("\n")}\n`;
}

function acceptedText(value: unknown): string {
	return value === "" ? "(empty)" : value === null ? "none" : String(value);
}

function groupByReason(): Map<string, { name: string; neutral: readonly unknown[] }[]> {
	const groups = new Map<string, { name: string; neutral: readonly unknown[] }[]>();
	for (const [name, { why, neutral }] of Object.entries(NOT_BUILT)) {
		groups.set(why, [...(groups.get(why) ?? []), { name, neutral }]);
	}
	return groups;
}

/** A part of the JSON Schema, as far as options have such parts. */
interface JsonSchema {
	$ref?: string;
	const?: unknown;
	enum?: unknown[];
	anyOf?: JsonSchema[];
	type?: string | string[];
	items?: JsonSchema;
	additionalProperties?: JsonSchema;
}

/** The alternatives of a type, as TypeScript writes them. */
function alternatives(schema: JsonSchema): string[] {
	if (schema.$ref !== undefined) return ["JsonValue"];
	if (schema.const !== undefined) return [JSON.stringify(schema.const)];
	if (schema.enum) return schema.enum.map((value) => JSON.stringify(value));
	if (schema.anyOf) return [...new Set(schema.anyOf.flatMap(alternatives))];
	return [schema.type ?? []].flat().map((type) => {
		if (type === "integer") return "number";
		const parts = alternatives(schema.items ?? schema.additionalProperties ?? {}).join(" | ");
		if (type === "array") return parts.includes("|") ? `(${parts})[]` : `${parts}[]`;
		return type === "object" ? `Record<string, ${parts}>` : type;
	});
}

/** The module with `TrainingOptions`: every option with its type, text, range, default and other names. */
export function optionsTypescript(): string {
	const { properties } = configJsonSchema() as { properties: Record<string, JsonSchema> };
	const lines = [
		"/** The options of a training run. Generated from the schema (`npm run docs:options`). */",
		"",
		"type JsonValue = string | number | boolean | null | JsonValue[] | { [name: string]: JsonValue };",
		"",
		"/** Options as a user writes them: in `arl.config.ts`, a file, or an object. What a description calls none is `null` here. */",
		"export interface TrainingOptions {",
	];
	for (const [group, fields] of Object.entries(GROUPS)) {
		lines.push(...(group === "Model" ? [] : [""]), `\t// ${group}`, "");
		for (const [name, field] of Object.entries(fields)) {
			const { description, expects } = metaOf(field);
			const { success, data } = field.safeParse(undefined);
			const others = Object.keys(ALIASES).filter((other) => ALIASES[other]?.to === name);
			const also =
				others.length > 0 ? ` Files and flags may call it ${others.map((other) => `\`${other}\``).join(" or ")}.` : "";
			const about = wrap(`${description} Expected: ${expects}.${also}`, 114);
			if (success) about.push(`@default ${JSON.stringify(data)}`);
			const types = alternatives(properties[name] ?? {});
			const line = `\t${name}${success ? "?" : ""}: ${types.join(" | ")};`;
			lines.push("\t/**", ...about.map((text) => `\t * ${text.replaceAll("*/", "*\\/")}`.trimEnd()), "\t */");
			if (line.length < 120) lines.push(line);
			else lines.push(`\t${name}${success ? "?" : ""}:`, `${types.map((type) => `\t\t| ${type}`).join("\n")};`);
		}
	}
	return `${lines.join("\n")}\n}\n`;
}
