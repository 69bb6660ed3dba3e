/**
 * Options that name a model or rows on the Hugging Face Hub, with local paths in their place. What is named locally stays as it
 * is, and then the Hub is not asked and its client not loaded.
 */
import { evalSources } from "../config/eval-sources.js";
import { exists } from "../disk/folders.js";
import { ArlError } from "../errors.js";
import { cachedCommit, type FetchCalls } from "./cache.js";
import { localRows } from "./dataset.js";
import { localModel } from "./model.js";
import { hiddenModel, hubModel, isHubUrl } from "./names.js";
import { hubSettings } from "./settings.js";

export type { FetchCalls, FetchProgress } from "./cache.js";

/** The options that may name something on the Hub. */
interface Named {
	model_name_or_path: string;
	train_file: readonly string[];
	eval_file: readonly string[];
}

/** Something to fetch, and how it is reported. */
export interface FetchOptions extends Partial<FetchCalls> {
	/** Whether the weights are needed. */
	weights: boolean;
}

/** A model's local folder, and what a user should know of it; null: nothing. */
export async function modelFolder(
	name: string,
	{ weights, ...calls }: FetchOptions,
): Promise<{ path: string; notice: string | null }> {
	const repo = await hubModel(name);
	const settings = await hubSettings();
	if (repo !== null) return localModel(repo, settings, weights, { ...SILENT, ...calls });
	const hidden = hiddenModel(name);
	if (hidden === null) return { path: name, notice: null };
	const isHub = hidden.name.startsWith("Qwen/") || (await cachedCommit(settings.cache, hidden)) !== null;
	const isFolder = isHub && (await exists(name));
	const notice = isFolder ? `${name} is a local folder, and is used; hf://${name} names the model of the Hub` : null;
	return { path: name, notice };
}

/** Local paths of entries of `train_file`. */
export async function rowFiles(
	entries: readonly string[],
	calls: Partial<FetchCalls> = {},
): Promise<{ entries: string[]; notices: string[] }> {
	const notices: string[] = [];
	const paths: string[] = [];
	for (const entry of entries) {
		if (!isHubUrl(entry)) paths.push(entry);
		else {
			const { path, notice } = await localRows(entry, await hubSettings(), { ...SILENT, ...calls });
			paths.push(path);
			notices.push(notice);
		}
	}
	return { entries: paths, notices };
}

const SILENT: FetchCalls = { signal: null, progress: () => {} };

/** Whether the options name anything that may have to be fetched. */
export async function namesHub(args: Partial<Named>): Promise<boolean> {
	if ([...(args.train_file ?? []), ...(args.eval_file ?? [])].some((entry) => entry.includes("hf://"))) return true;
	return args.model_name_or_path !== undefined && (await hubModel(args.model_name_or_path)) !== null;
}

/**
 * The options with local paths for what they name on the Hub, which is fetched where the cache lacks it.
 *
 * @throws ArlError `ARL_NETWORK` where that fails.
 */
export async function localArgs<Args extends Named & { resume_from_checkpoint?: string | null }>(
	args: Args,
	options: FetchOptions,
): Promise<{ args: Args; notices: string[] }> {
	const notices: string[] = [];
	const { model_name_or_path: name, resume_from_checkpoint: resumes = null } = args;
	let model = name;
	try {
		const found = await modelFolder(name, options);
		model = found.path;
		if (found.notice !== null) notices.push(found.notice);
	} catch (thrown) {
		// A checkpoint has the model itself.
		if (resumes === null || !(thrown instanceof ArlError) || thrown.code !== "ARL_NETWORK") throw thrown;
		notices.push(`model_name_or_path: ${thrown.message}`);
	}
	const train = await rowFiles(args.train_file, options);
	const held = await heldOutFiles(args.eval_file, options);
	notices.push(...train.notices, ...held.notices);
	const local = { ...args, model_name_or_path: model, train_file: train.entries, eval_file: held.entries };
	return { args: local, notices };
}

/** As `rowFiles`; an entry keeps the name under which its figures are reported, which a snapshot's folder would not give. */
async function heldOutFiles(entries: readonly string[], calls: Partial<FetchCalls>) {
	const notices: string[] = [];
	const paths: string[] = [];
	for (const entry of entries) {
		const [source] = evalSources([entry]);
		if (source === undefined || !isHubUrl(source.path)) {
			paths.push(entry);
			continue;
		}
		const found = await rowFiles([source.path], calls);
		paths.push(`${source.name}=${found.entries[0]}`);
		notices.push(...found.notices);
	}
	return { entries: paths, notices };
}
