/** A model of the Hub as a local folder: the files that arl needs, out of the cache or fetched into it. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { exists } from "../disk/folders.js";
import { ArlError } from "../errors.js";
import { cachedCommit, type FetchCalls, fillSnapshot, rememberCommit, snapshotFolder } from "./cache.js";
import { HubClient, type HubFile } from "./client.js";
import type { Repo } from "./names.js";
import type { HubSettings } from "./settings.js";

/** What was found. */
export interface LocalModel {
	path: string;
	/** For the user, in one line. */
	notice: string;
}

/** Small files that a model, its tokenizer and its template consist of; those of processors belong to a saved model. */
const COMPANIONS = new Set([
	"config.json",
	"generation_config.json",
	"tokenizer.json",
	"tokenizer_config.json",
	"special_tokens_map.json",
	"added_tokens.json",
	"vocab.json",
	"merges.txt",
	"vocab.txt",
	"tokenizer.model",
	"chat_template.jinja",
	"chat_template.json",
	"preprocessor_config.json",
	"processor_config.json",
	"video_preprocessor_config.json",
]);
/** Without these the cache is asked to be completed. */
const NEEDED = ["config.json", "tokenizer.json", "tokenizer_config.json"];
const TEMPLATES = /^additional_chat_templates\/[^/]+\.jinja$/;
const WHOLE = "model.safetensors";
const INDEX = "model.safetensors.index.json";

/**
 * The local folder of a model. What the cache has whole is taken as it is, without a question to the Hub.
 *
 * @throws ArlError `ARL_NETWORK` where it cannot be fetched, `ARL_CONFIG` or `ARL_WEIGHTS` where it is no model of this kind.
 */
export async function localModel(
	repo: Repo,
	settings: HubSettings,
	weights: boolean,
	calls: FetchCalls,
): Promise<LocalModel> {
	const { cache, offline } = settings;
	const cached = await cachedCommit(cache, repo);
	if (cached !== null) {
		const path = snapshotFolder(cache, repo, cached);
		if (await isWhole(path, weights))
			return { path, notice: `${named(repo, cached)} is taken from the cache: ${path}` };
	}
	if (offline) {
		const what = cached === null ? "is not in the cache" : "is in the cache only in part";
		throw new ArlError(
			"ARL_NETWORK",
			`${repo.name} ${what} (${cache}), and HF_HUB_OFFLINE forbids to fetch it`,
			"Unset HF_HUB_OFFLINE, set HF_HOME to the cache that has it, or give the model's folder.",
		);
	}
	const client = new HubClient(settings, calls.signal);
	try {
		const commit = cached ?? (await client.commit(repo));
		const { files } = await client.files(repo, commit, "", true);
		const small = files.filter(({ path }) => COMPANIONS.has(path) || TEMPLATES.test(path));
		const tensors = weights ? await tensorFiles(client, repo, commit, files, settings, calls) : [];
		if (!small.some(({ path }) => path === "config.json")) {
			const hint = "Give a model in the layout of transformers, with config.json and safetensors weights.";
			throw new ArlError("ARL_CONFIG", `${repo.name} has no config.json at revision ${repo.revision}`, hint);
		}
		const bytes = await fillSnapshot(client, cache, repo, commit, [...small, ...tensors], calls);
		await rememberCommit(cache, repo, commit);
		const path = snapshotFolder(cache, repo, commit);
		return { path, notice: `${named(repo, commit)}: fetched ${megabytes(bytes)} from ${client.address} into ${path}` };
	} finally {
		await client.close();
	}
}

function named({ name, revision }: Repo, commit: string): string {
	return revision === commit
		? `${name} at ${commit.slice(0, 12)}`
		: `${name} (${revision}, commit ${commit.slice(0, 12)})`;
}

/** Bytes in words. */
export function megabytes(bytes: number): string {
	return bytes < 1e8 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}

/** The files of weights: one, or those that the index lists. */
async function tensorFiles(
	client: HubClient,
	repo: Repo,
	commit: string,
	files: readonly HubFile[],
	{ cache }: HubSettings,
	calls: FetchCalls,
): Promise<HubFile[]> {
	const whole = files.find(({ path }) => path === WHOLE);
	if (whole) return [whole];
	const index = files.find(({ path }) => path === INDEX);
	if (index === undefined) {
		const others = files.filter(({ path }) => /\.(bin|pth|gguf|h5|msgpack|onnx)$/.test(path)).map(({ path }) => path);
		const has = others.length > 0 ? `, only ${others.slice(0, 3).join(", ")}` : "";
		throw new ArlError(
			"ARL_WEIGHTS",
			`${repo.name} has no safetensors weights at revision ${repo.revision}${has}`,
			"Choose a repository with model.safetensors. Weights of other kinds: load them with transformers, and save them.",
		);
	}
	await fillSnapshot(client, cache, repo, commit, [index], calls);
	const shards = await shardsOf(snapshotFolder(cache, repo, commit));
	const found = files.filter(({ path }) => shards?.has(path));
	if (shards === null || found.length < shards.size) {
		const missing = [...(shards ?? [])].filter((shard) => !found.some(({ path }) => path === shard));
		const what = shards === null ? `${INDEX} is no index` : `${INDEX} lists files that it lacks: ${missing.join(", ")}`;
		throw new ArlError("ARL_WEIGHTS", `${repo.name}: ${what}`, "Choose another revision, or another repository.");
	}
	return [index, ...found];
}

/** The files that the index of a snapshot lists; null: it has none. */
async function shardsOf(snapshot: string): Promise<Set<string> | null> {
	try {
		const { weight_map: map } = JSON.parse(await readFile(join(snapshot, INDEX), "utf8")) as { weight_map: object };
		return new Set(Object.values(map).map(String));
	} catch {
		return null;
	}
}

/** Whether a snapshot has what arl needs. */
async function isWhole(snapshot: string, weights: boolean): Promise<boolean> {
	const has = (name: string) => exists(join(snapshot, name));
	for (const name of NEEDED) if (!(await has(name))) return false;
	if (!weights || (await has(WHOLE))) return true;
	const shards = await shardsOf(snapshot);
	if (shards === null) return false;
	for (const shard of shards) if (!(await has(shard))) return false;
	return true;
}
