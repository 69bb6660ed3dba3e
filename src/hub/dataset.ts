/** Files of a data set of the Hub as local paths: out of the cache, or fetched into it. */
import { join } from "node:path";
import { exists } from "../disk/folders.js";
import { ArlError } from "../errors.js";
import { cachedCommit, cachedFiles, type FetchCalls, fillSnapshot, rememberCommit, snapshotFolder } from "./cache.js";
import { HubClient, type HubFile } from "./client.js";
import { megabytes } from "./model.js";
import { type DatasetFiles, datasetFiles } from "./names.js";
import type { HubSettings } from "./settings.js";

/** What was found: a path as `train_file` takes it. */
export interface LocalRows {
	path: string;
	/** For the user, in one line. */
	notice: string;
}

const ROW_FILE = /\.(jsonl|ndjson|json|parquet|csv|tsv)(\.(gz|zst|zstd))?$/i;
const PATTERN = /[*?[]/;

/**
 * The local path of `hf://datasets/OWNER/NAME[@REVISION][/PATH]`: a file, a folder of files of rows, or a pattern. A revision that
 * the cache knows stays at its commit; a file that the cache has is not asked for.
 *
 * @throws ArlError `ARL_NETWORK` where it cannot be fetched, `ARL_DATA` where it has no rows.
 */
export async function localRows(url: string, settings: HubSettings, calls: FetchCalls): Promise<LocalRows> {
	const wanted = datasetFiles(url);
	const { repo, path } = wanted;
	const { cache, offline } = settings;
	const cached = await cachedCommit(cache, repo);
	const isPattern = PATTERN.test(path);
	if (cached !== null) {
		const local = join(snapshotFolder(cache, repo, cached), path);
		// Of a folder the cache does not know whether it is whole.
		const isFile = !isPattern && ROW_FILE.test(path) && (await exists(local));
		const isThere = isFile || (offline && (await hasRows(snapshotFolder(cache, repo, cached), wanted)));
		if (isThere) return { path: local, notice: `${url} is taken from the cache, commit ${cached.slice(0, 12)}` };
	}
	if (offline) {
		throw new ArlError(
			"ARL_NETWORK",
			`${url} is not in the cache (${cache}), and HF_HUB_OFFLINE forbids to fetch it`,
			"Unset HF_HUB_OFFLINE, set HF_HOME to the cache that has it, or give local files.",
		);
	}
	const client = new HubClient(settings, calls.signal);
	try {
		const commit = cached ?? (await client.commit(repo));
		const files = await filesOf(client, wanted, commit);
		if (files.length === 0) {
			const hint = `Rows are in .jsonl, .json, .parquet, .csv and .tsv files; ${client.address}/datasets/${repo.name}/tree/${repo.revision} lists what there is.`;
			throw new ArlError("ARL_DATA", `${url}: no file of rows`, hint);
		}
		const bytes = await fillSnapshot(client, cache, repo, commit, files, calls);
		await rememberCommit(cache, repo, commit);
		const many = files.length === 1 ? "1 file" : `${files.length} files`;
		const notice = `${url}: ${many} at commit ${commit.slice(0, 12)}, ${megabytes(bytes)} of it fetched from ${client.address}`;
		return { path: join(snapshotFolder(cache, repo, commit), path), notice };
	} finally {
		await client.close();
	}
}

/** The files that `path` names: itself, those of rows below it, or those that match the pattern. */
async function filesOf(client: HubClient, { repo, path }: DatasetFiles, commit: string): Promise<HubFile[]> {
	const at = path.search(PATTERN);
	if (at >= 0) {
		const folder = path.slice(0, Math.max(0, path.lastIndexOf("/", at)));
		const wanted = patternRegExp(path);
		const { files } = await client.files(repo, commit, folder, true);
		return files.filter((file) => ROW_FILE.test(file.path) && wanted.test(file.path));
	}
	const above = path.includes("/") ? path.slice(0, path.lastIndexOf("/")) : "";
	if (path !== "") {
		const { files, folders } = await client.files(repo, commit, above, false);
		const file = files.find((one) => one.path === path);
		if (file) return [file];
		if (!folders.includes(path)) {
			const hint = `${client.address}/datasets/${repo.name}/tree/${repo.revision} lists its files.`;
			throw new ArlError("ARL_NETWORK", `${repo.name}: there is no ${path} at revision ${repo.revision}`, hint);
		}
	}
	const { files } = await client.files(repo, commit, path, true);
	return files.filter((file) => ROW_FILE.test(file.path));
}

/** A pattern as `train_file` has it, for whole paths of a repository: `**` any folders, `*` and `?` within a name, `[abc]`. */
function patternRegExp(pattern: string): RegExp {
	const source = pattern
		.replace(/[\\^$.+(){}|]/g, "\\$&")
		.replaceAll("[!", "[^")
		.replace(/\*\*\/|\*|\?/g, (mark) => (mark === "**/" ? "(?:[^/]+/)*" : mark === "*" ? "[^/]*" : "[^/]"));
	try {
		return new RegExp(`^${source}$`, "u");
	} catch (cause) {
		const hint = "Write ranges as [a-z].";
		throw new ArlError("ARL_CONFIG", `${pattern}: invalid pattern`, hint, { cause });
	}
}

async function hasRows(snapshot: string, { path }: DatasetFiles): Promise<boolean> {
	const folder = PATTERN.test(path) ? "" : path;
	return (await cachedFiles(snapshot, folder)).some((file) => ROW_FILE.test(file));
}
