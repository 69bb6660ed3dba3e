/** Checks that `output_dir` holds nothing that a run would destroy without having been asked to. Changes nothing. */
import { readdir, realpath } from "node:fs/promises";
import { dirname, join, relative, sep } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { exists } from "../../disk/folders.js";
import { ArlError } from "../../errors.js";
import { METRICS_FILE } from "../../report/metrics.js";
import { MERGED_FOLDER } from "../../report/runs/record.js";
import { checkpointsIn, MANIFEST_FILE } from "./checkpoint.js";
import { namesOfOldRun } from "./old-run.js";
import { isModelFile, MODEL_LIST, publishedFiles } from "./publish.js";

type Options = Pick<
	AgentTrainingConfig,
	| "output_dir"
	| "overwrite_output_dir"
	| "resume_from_checkpoint"
	| "model_name_or_path"
	| "chat_template"
	| "adapter_name_or_path"
	| "merge_adapter"
>;

/** Checks that the folder holds no run and no model, except what the options resume or replace. */
export async function checkOutputContent(options: Options): Promise<void> {
	const { output_dir: outputDir, resume_from_checkpoint: resume } = options;
	await checkInputs(options);
	if (options.merge_adapter) await checkMergedPlace(outputDir);
	if (options.overwrite_output_dir) return;
	const { own, foreign } = await checkpointsIn(outputDir);
	if (foreign[0]) throw foreignCheckpoint(foreign[0].path, resume !== null);
	const traces = own.map(({ path }) => relative(outputDir, path));
	for (const name of [METRICS_FILE, MODEL_LIST]) if (await exists(join(outputDir, name))) traces.push(name);
	const resumed = resume !== null && (resume === "latest" || (await isInside(resume, outputDir)));
	if (traces.length > 0 && !resumed) {
		throw new ArlError(
			"ARL_CONFIG",
			`output_dir: ${outputDir} holds another run (${few(traces)})`,
			"Choose another output_dir, resume that run (--resume_from_checkpoint latest), or replace it (--overwrite_output_dir).",
		);
	}
	const published = new Set(await publishedFiles(outputDir));
	const names = await readdir(outputDir).catch(() => []);
	const model = names.filter((name) => isModelFile(name) && !published.has(name)).sort(weightsFirst);
	if (model.length === 0) return;
	throw new ArlError(
		"ARL_CONFIG",
		`output_dir: ${outputDir} holds a model that this program did not write there (${few(model)})`,
		resume === null
			? "Choose another output_dir, move the model away, or replace it (--overwrite_output_dir)."
			: "Move these files away: the trained model would replace them.",
	);
}

/** Checks that the place of the merged model is free, or this program's own. */
async function checkMergedPlace(outputDir: string): Promise<void> {
	const place = join(outputDir, MERGED_FOLDER);
	if (!(await exists(place)) || (await publishedFiles(outputDir)).includes(MERGED_FOLDER)) return;
	throw new ArlError(
		"ARL_CONFIG",
		`merge_adapter: ${place} exists, and this program did not write it there`,
		"Move it away, or choose another output_dir.",
	);
}

function few(names: string[]): string {
	return `${names.slice(0, 3).join(", ")}${names.length > 3 ? ` and ${names.length - 3} more` : ""}`;
}

function weightsFirst(a: string, b: string): number {
	const isOther = (name: string) => Number(!/\.(safetensors|bin|pth|h5|msgpack)$/.test(name));
	return isOther(a) - isOther(b) || (a < b ? -1 : 1);
}

function foreignCheckpoint(path: string, resumed: boolean): ArlError {
	const replace = resumed ? "--overwrite_output_dir in place of --resume_from_checkpoint" : "--overwrite_output_dir";
	return new ArlError(
		"ARL_CONFIG",
		`output_dir: ${path} is a checkpoint of another program: ${MANIFEST_FILE} is missing`,
		`Choose another output_dir, start from that model in another output_dir (--model_name_or_path ${path}), or replace it (${replace}).`,
	);
}

async function isInside(path: string, folder: string): Promise<boolean> {
	const real = await realpath(path).catch(() => null);
	return real !== null && dirname(real) === (await realpath(folder));
}

/** Checks that the run does not set aside, remove or replace what it reads. Follows symbolic links. */
async function checkInputs(options: Options): Promise<void> {
	const { output_dir: outputDir, model_name_or_path: model, chat_template: template } = options;
	const { adapter_name_or_path: adapter } = options;
	const realOutput = await realpath(outputDir);
	const realModel = await realpath(model).catch(() => null);
	if (realModel === realOutput) {
		throw new ArlError(
			"ARL_CONFIG",
			`output_dir and model_name_or_path are the same folder: ${outputDir}`,
			"The trained model would replace the one it starts from. Choose another output_dir.",
		);
	}
	const replaced = await namesOfOldRun(outputDir);
	const files = (await readdir(model).catch(() => [])).map((name) => join(model, name));
	const inputs = [
		...[model, ...files].map((path) => ({ option: "model_name_or_path", path })),
		...(template === null ? [] : [{ option: "chat_template", path: template }]),
		...(adapter === null ? [] : [{ option: "adapter_name_or_path", path: adapter }]),
	];
	for (const { option, path } of inputs) {
		const real = await realpath(path).catch(() => null);
		const within = real === null ? ".." : relative(realOutput, real);
		const hit = replaced.find((name) => within === name || within.startsWith(`${name}${sep}`));
		if (hit === undefined) continue;
		const leads = path === real ? "" : ` (${real})`;
		throw new ArlError(
			"ARL_CONFIG",
			`${option}: ${path}${leads} is in output_dir, where this run would remove or replace ${hit}`,
			`Choose another output_dir, or copy ${option === "chat_template" ? "the file" : "the model"} to another place first.`,
		);
	}
}
