/**
 * Resolves layers of options to the one configuration of a run: flags over a file's values over defaults. Pure: reads no
 * file and no environment. Reports every problem at once, each with the option's name, value, origin and range.
 */
import type { z } from "zod";
import { ArlError } from "../errors.js";
import { ALIASES, KNOWN_VALUES, NOT_BUILT } from "./compat.js";
import { checkTogether } from "./contradictions.js";
import { metaOf } from "./fields.js";
import { dataParallelOf } from "./mesh.js";
import { type AgentTrainingConfig, OPTION_NAMES, type OptionName, trainingSchema } from "./schema.js";
import { nearest, show, soundsSecret } from "./values.js";

/** Values by name, and their origin. */
export interface Layer {
	/** `flag`, `code`, or a file's path. */
	origin: string;
	values: Iterable<readonly [string, unknown]>;
}

/** The configuration of a run. */
export interface Resolved {
	/** Frozen: a changed copy is checked as any other object of options is. */
	args: AgentTrainingConfig;
	/** The origin of each value: `default`, `flag`, `code`, or a file's path. */
	origins: Record<OptionName, string>;
	/** Notices for the user: translated names, options without effect. */
	notices: string[];
}

/** Configurations that were checked in full; they are frozen, so nothing can have changed them since. */
const RESOLVED = new WeakSet<object>();

/** Whether `args` is the very object that `resolveConfig` has checked; a copy of it may hold anything. */
export function isResolved(args: object): args is AgentTrainingConfig {
	return RESOLVED.has(args);
}

/** Freezes a value with all that it holds. */
function freeze(value: unknown): void {
	if (typeof value !== "object" || value === null || Object.isFrozen(value)) return;
	Object.freeze(value);
	for (const part of Object.values(value)) freeze(part);
}

interface Given {
	value: unknown;
	origin: string;
	/** The name as it was written, which may be an alias. */
	written: string;
}

class Problems {
	readonly #lines: string[] = [];
	readonly #hints = new Set<string>();

	add(line: string, hint = ""): void {
		this.#lines.push(line);
		if (hint !== "") this.#hints.add(hint);
	}

	throwIfAny(): void {
		if (this.#lines.length === 0) return;
		throw new ArlError("ARL_CONFIG", this.#lines.join("\n"), [...this.#hints].join("\n"));
	}
}

/**
 * Resolves `layers`, the strongest last. `world`: the ranks that a launcher has started, 1 where there is none, null where their
 * number is not known; undefined: nothing is trained, and what ranks would divide does not matter.
 *
 * @throws ArlError `ARL_CONFIG` with a line for each problem.
 */
export function resolveConfig(layers: readonly Layer[], world?: number | null): Resolved {
	const problems = new Problems();
	const notices: string[] = [];
	const given = new Map<OptionName, Given>();
	for (const layer of layers) readLayer(layer, given, problems, notices);
	const result = trainingSchema.safeParse(Object.fromEntries([...given].map(([name, { value }]) => [name, value])));
	if (!result.success) for (const line of explain(result.error, given)) problems.add(line);
	// Only valid values can contradict each other.
	problems.throwIfAny();
	if (!result.success) throw new ArlError("ARL_INTERNAL", "a configuration was refused without a reason");
	const args = result.data;
	const started = world === 1 ? args.nproc_per_node : world;
	if (typeof started === "number" && !given.has("dp_size"))
		args.dp_size = dataParallelOf(args, started) ?? args.dp_size;
	checkTogether(
		args,
		(name) => {
			const found = given.get(name);
			return found && where(found.origin);
		},
		(line, hint) => problems.add(line, hint),
		notices,
		started,
	);
	problems.throwIfAny();
	freeze(args);
	RESOLVED.add(args);
	const origins = Object.fromEntries(OPTION_NAMES.map((name) => [name, given.get(name)?.origin ?? "default"]));
	return { args, origins: origins as Record<OptionName, string>, notices };
}

function readLayer(layer: Layer, given: Map<OptionName, Given>, problems: Problems, notices: string[]): void {
	const seen = new Map<OptionName, string>();
	for (const [written, raw] of layer.values) {
		if (raw === undefined) continue;
		const found = translate(written, raw, layer.origin, problems, notices);
		if (!found) continue;
		const { name, value } = found;
		const twin = seen.get(name);
		if (twin !== undefined && twin !== written) {
			problems.add(`${written} and ${twin} are two names of one option (${where(layer.origin)})`, `Give only ${name}.`);
			continue;
		}
		seen.set(name, written);
		const refused = [value].flat().flatMap((part) => {
			const reason = typeof part === "string" ? KNOWN_VALUES[name]?.[part] : undefined;
			return reason === undefined ? [] : [{ part, reason }];
		});
		for (const { part, reason } of refused)
			problems.add(`${written} ${part} (${where(layer.origin)}) is known and not built: ${reason}`);
		if (refused.length > 0) continue;
		given.set(name, { value, origin: layer.origin, written });
	}
}

/** The option that a name sets, with its value; undefined: it sets nothing, or is refused. */
function translate(
	written: string,
	value: unknown,
	origin: string,
	problems: Problems,
	notices: string[],
): { name: OptionName; value: unknown } | undefined {
	if (Object.hasOwn(trainingSchema.shape, written)) return { name: written as OptionName, value };
	if (Object.hasOwn(ALIASES, written)) {
		const alias = ALIASES[written];
		if (!alias) return undefined;
		const refused = alias.refuse?.(value);
		if (refused !== undefined) {
			problems.add(`${written} ${show(value)} (${where(origin)}): ${refused}`);
			return undefined;
		}
		const meant = alias.value ? alias.value(value) : value;
		if (meant === undefined) return undefined;
		const as = meant === value ? alias.to : `${alias.to} ${show(meant)}`;
		notices.push(`${written} (${where(origin)}) is read as ${as}`);
		return { name: alias.to, value: meant };
	}
	const known = Object.hasOwn(NOT_BUILT, written) ? NOT_BUILT[written] : undefined;
	if (known) {
		if (known.neutral.some((neutral) => neutral === value)) return undefined;
		if (Array.isArray(value) && value.length === 0) return undefined;
		const shown = known.secret || soundsSecret(written) ? "" : ` ${show(value)}`;
		problems.add(`${written}${shown} (${where(origin)}) is known and not built: ${known.why}`);
		return undefined;
	}
	const near = nearest(written, [...OPTION_NAMES, ...Object.keys(ALIASES), ...Object.keys(NOT_BUILT)]);
	const hint = near ? `Did you mean ${near}?` : "`arl train --help` lists every option.";
	problems.add(`unknown option ${show(written)} (${where(origin)})`, hint);
	return undefined;
}

/** How an origin reads in a sentence. */
function where(origin: string): string {
	return origin === "flag" ? "a flag" : origin === "code" ? "in code" : origin === "default" ? "the default" : origin;
}

/** A line for each option that the schema refuses. */
function explain(error: z.ZodError, given: ReadonlyMap<OptionName, Given>): string[] {
	const lines = new Map<string, string>();
	for (const issue of error.issues) {
		const name = String(issue.path[0] ?? "") as OptionName;
		if (lines.has(name)) continue;
		const schema = Object.hasOwn(trainingSchema.shape, name) ? trainingSchema.shape[name] : undefined;
		const meta = schema && metaOf(schema);
		const found = given.get(name);
		if (!found) {
			lines.set(name, `${name} is missing: expected ${meta?.expects ?? "a value"}`);
			continue;
		}
		const value = meta?.secret || soundsSecret(found.written) ? "its value" : show(found.value);
		const path = issue.path
			.slice(1)
			.map((part) => `.${String(part)}`)
			.join("");
		lines.set(
			name,
			`${found.written}${path}: ${value} (${where(found.origin)}); expected ${meta?.expects ?? issue.message}`,
		);
	}
	return [...lines.values()];
}
