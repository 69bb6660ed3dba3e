/**
 * File name patterns: `*` and `?` within a name, `**` over folders, `[abc]`. Node has a glob of its own only from 22 on.
 */
import { readdir } from "node:fs/promises";
import { join, parse } from "node:path";

/** Whether a name is a pattern at all. */
export function isGlob(pattern: string): boolean {
	return /[*?[]/.test(pattern);
}

function nameToRegExp(pattern: string): RegExp {
	let source = "";
	for (let i = 0; i < pattern.length; i++) {
		const char = pattern.charAt(i);
		if (char === "*") source += "[^/]*";
		else if (char === "?") source += "[^/]";
		else if (char === "[" && pattern.indexOf("]", i + 2) > 0) {
			const end = pattern.indexOf("]", i + 2);
			const set = pattern
				.slice(i + 1, end)
				.replace(/\\/g, "\\\\")
				.replace(/^!/, "^");
			source += `[${set}]`;
			i = end;
		} else source += char.replace(/[\\^$.*+?()[\]{}|]/, "\\$&");
	}
	return new RegExp(`^${source}$`, "u");
}

/** Files that a pattern names, in the order of their names (code units), so that every machine reads the same order. */
export async function glob(pattern: string): Promise<string[]> {
	const { root } = parse(pattern);
	const segments = pattern
		.slice(root.length)
		.split("/")
		.filter((segment) => segment !== "" && segment !== ".");
	const found = new Set<string>();
	await walk(root, segments, found);
	return [...found].sort((a, b) => (a < b ? -1 : a > b ? 1 : 0));
}

async function walk(folder: string, segments: string[], found: Set<string>): Promise<void> {
	const [segment, ...rest] = segments;
	if (segment === undefined) return;
	if (segment !== "**" && !isGlob(segment)) {
		// A plain name needs no listing, only a join; the last one is checked by being listed below.
		if (rest.length > 0) return walk(join(folder, segment), rest, found);
	}
	const entries = await readdir(folder === "" ? "." : folder, { withFileTypes: true }).catch(() => []);
	if (segment === "**") {
		await walk(folder, rest.length > 0 ? rest : ["*"], found);
		for (const entry of entries) {
			if (entry.isDirectory() && !entry.name.startsWith(".")) await walk(join(folder, entry.name), segments, found);
		}
		return;
	}
	const matches = nameToRegExp(segment);
	for (const entry of entries) {
		// As in a shell, a leading dot has to be asked for.
		if (!matches.test(entry.name) || (entry.name.startsWith(".") && !segment.startsWith("."))) continue;
		const path = join(folder, entry.name);
		if (rest.length > 0) await walk(path, rest, found);
		else if (!entry.isDirectory()) found.add(path);
	}
}
