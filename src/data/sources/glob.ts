/**
 * File name patterns: `*` and `?` within a name, `**` across folders, `[abc]`. Node's own glob exists only from version 22 on.
 */
import { readdir, stat } from "node:fs/promises";
import { join, parse, sep } from "node:path";
import { ArlError, toArlError } from "../../errors.js";

/** Whether a name is a pattern. */
export function isGlob(pattern: string): boolean {
	return /[*?[]/.test(pattern);
}

/** Separators in a pattern: `/` works on every system. */
const SEPARATORS = sep === "/" ? "/" : /[\\/]/;

function nameToRegExp(pattern: string, whole: string): RegExp {
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
	try {
		return new RegExp(`^${source}$`, "u");
	} catch (cause) {
		throw new ArlError(
			"ARL_CONFIG",
			`${whole}: invalid pattern: ${JSON.stringify(pattern)} has a malformed set in brackets, such as a backwards range`,
			"Write ranges as [a-z]; write a bracket that is part of a name as [[].",
			{ cause },
		);
	}
}

/** The files that match a pattern, sorted by name (code units), so that the order is the same on every machine. */
export async function glob(pattern: string): Promise<string[]> {
	const { root } = parse(pattern);
	const segments = pattern
		.slice(root.length)
		.split(SEPARATORS)
		.filter((segment) => segment !== "" && segment !== ".");
	const found = new Set<string>();
	await walk(root, segments, { whole: pattern, found });
	return [...found].sort((a, b) => (a < b ? -1 : a > b ? 1 : 0));
}

/** A pattern being matched. */
interface Search {
	/** As the user wrote it. */
	whole: string;
	found: Set<string>;
}

async function walk(folder: string, segments: string[], search: Search): Promise<void> {
	const [segment, ...rest] = segments;
	if (segment === undefined) return;
	if (segment !== "**" && !isGlob(segment)) {
		// A plain name needs no listing; the last one is checked by the listing below.
		if (rest.length > 0) return walk(join(folder, segment), rest, search);
	}
	const entries = await readdir(folder === "" ? "." : folder, { withFileTypes: true }).catch(nothing);
	if (segment === "**") {
		await walk(folder, rest.length > 0 ? rest : ["*"], search);
		for (const entry of entries) {
			// As in a shell, `**` does not follow links: they may form a cycle.
			if (entry.isDirectory() && !entry.name.startsWith(".")) await walk(join(folder, entry.name), segments, search);
		}
		return;
	}
	const matches = nameToRegExp(segment, search.whole);
	for (const entry of entries) {
		// As in a shell, a leading dot must be written in the pattern.
		if (!matches.test(entry.name) || (entry.name.startsWith(".") && !segment.startsWith("."))) continue;
		const path = join(folder, entry.name);
		if (rest.length > 0) await walk(path, rest, search);
		else if (!entry.isDirectory() && !(entry.isSymbolicLink() && (await isFolder(path)))) search.found.add(path);
	}
}

/** A folder that does not exist has no files; a folder that may not be read is an error. */
function nothing(error: NodeJS.ErrnoException): [] {
	if (error.code === "ENOENT" || error.code === "ENOTDIR") return [];
	throw toArlError(error);
}

/** Whether a path leads to a folder. A dangling link does not, and is reported when it is opened. */
async function isFolder(path: string): Promise<boolean> {
	return stat(path).then(
		(info) => info.isDirectory(),
		() => false,
	);
}
