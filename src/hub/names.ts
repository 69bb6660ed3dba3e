/** Names of models and data sets on the Hugging Face Hub, as options have them. Pure, but for a look at what exists locally. */
import { join } from "node:path";
import { exists } from "../disk/folders.js";
import { ArlError } from "../errors.js";

/** A repository of the Hub at a revision. */
export interface Repo {
	type: "model" | "dataset";
	/** `Qwen/Qwen3-0.6B` */
	name: string;
	/** A branch, a tag, or a commit. */
	revision: string;
}

/** Files of a data set. */
export interface DatasetFiles {
	repo: Repo;
	/** A file, a folder, or a pattern; empty: the whole repository. */
	path: string;
}

const SCHEME = "hf://";
const NAME = /^([A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*)(?:@(.+))?$/;
/** Revisions with a slash: those of pull requests and of the Hub's own conversions. */
const DATASET = /^([^/@]+\/[^/@]+)(?:@(refs\/(?:pr|convert)\/[^/]+|[^/]+))?(?:\/(.*))?$/;

/** Whether an entry names rows of the Hub. */
export function isHubUrl(entry: string): boolean {
	return entry.startsWith(SCHEME);
}

/**
 * The model that `text` names on the Hub (`OWNER/NAME`, `OWNER/NAME@REVISION`, or either behind `hf://`); null: a local path.
 * What exists locally is local, and so is a path whose first folder exists: it is a mistyped one rather than an owner's name.
 *
 * @throws ArlError `ARL_CONFIG` where it begins with `hf://` and names no model.
 */
export async function hubModel(text: string): Promise<Repo | null> {
	const explicit = isHubUrl(text);
	const [, name, revision = "main"] =
		NAME.exec(explicit ? text.slice(SCHEME.length).replace(/^models\//, "") : text) ?? [];
	if (name === undefined) {
		if (!explicit) return null;
		const hint = "Write hf://OWNER/NAME or hf://OWNER/NAME@REVISION, for example hf://Qwen/Qwen3-0.6B.";
		throw new ArlError("ARL_CONFIG", `model_name_or_path: ${text} names no model of the Hub`, hint);
	}
	const [owner = ""] = name.split("/");
	if (!explicit && ((await exists(text)) || (await exists(owner)))) return null;
	return { type: "model", name, revision: revisionOf(revision, text) };
}

/** The model of the Hub that a local folder hides; null: the folder's name is no such name. */
export function hiddenModel(text: string): Repo | null {
	const [, name, revision = "main"] = NAME.exec(text) ?? [];
	return name === undefined ? null : { type: "model", name, revision };
}

/**
 * The files that `hf://datasets/OWNER/NAME[@REVISION][/PATH]` names.
 *
 * @throws ArlError `ARL_DATA` where it is not written so.
 */
export function datasetFiles(url: string): DatasetFiles {
	const [, name, revision = "main", path = ""] = DATASET.exec(url.slice(`${SCHEME}datasets/`.length)) ?? [];
	if (!url.startsWith(`${SCHEME}datasets/`) || name === undefined || path.split("/").includes("..")) {
		const hint = "Write hf://datasets/OWNER/NAME/PATH or hf://datasets/OWNER/NAME@REVISION/PATH.";
		throw new ArlError("ARL_DATA", `${url} names no data set of the Hub`, hint);
	}
	const plain = path.replace(/\/+$/, "");
	return { repo: { type: "dataset", name, revision: revisionOf(revision, url) }, path: plain };
}

/** A revision as it is written: `%2F` is a slash. Throws `ARL_CONFIG` where it cannot be one, as it names a file of the cache. */
function revisionOf(text: string, whole: string): string {
	let revision = "";
	try {
		revision = decodeURIComponent(text);
	} catch {
		// Refused below.
	}
	const isSafe = revision.split("/").every((part) => /^[\w-][\w.+-]*$/.test(part));
	if (isSafe) return revision;
	throw new ArlError(
		"ARL_CONFIG",
		`${whole}: ${JSON.stringify(text)} is no revision`,
		"Give a branch, a tag or a commit.",
	);
}

/** The folder of a repository in the cache, as every program of Hugging Face's calls it. */
export function repoFolder(cache: string, { type, name }: Repo): string {
	return join(cache, `${type}s--${name.replaceAll("/", "--")}`);
}
