/**
 * What a run starts from: a model, its tokenizer and a device. A resumed run takes the model from the checkpoint, which is a
 * complete model, so the folder of the first one may be gone; if it still exists, it must be the same model.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { type ChosenDevice, chooseDevice } from "../../device/index.js";
import { exists } from "../../disk/folders.js";
import { toArlError } from "../../errors.js";
import { notice, type TrainEvent } from "../../events.js";
import type { Native, NativeTextEncoder, TextInfo, TextOptions } from "../../native.js";
import { bytesToTenth } from "../../report/format.js";
import type { Resumable } from "../checkpoint/checkpoint.js";
import { bf16Of, modelIdentityOf, trainsImages } from "../checkpoint/state.js";
import { adaptedText, hasAdapters } from "./lora.js";
import { baseIdentity, type ModelFolder, readModelFolder } from "./model.js";
import {
	cacheDir,
	engineOptions,
	type ResolvedConfig,
	resolveBf16,
	resolveForDevice,
	textOptions as textOptionsOf,
} from "./options.js";
import { checkTokenizer } from "./preflight.js";
import { checkFreeze, openVision, type Vision } from "./vision.js";

/** What a run starts from, checked. */
export interface Start {
	args: ResolvedConfig;
	/** The folder that the engine is opened on; its identity is that of the model that the run began with. */
	model: ModelFolder;
	device: ChosenDevice;
	encoder: NativeTextEncoder;
	text: TextInfo;
	/** How rows become tokens. */
	textOptions: TextOptions;
	/** How images are loaded and resized; null: no images are trained. */
	vision: Vision | null;
	/** The template that renders the rows, if it replaces the model's. */
	chatTemplate: string | null;
	/** The checkpoint that the run resumes from. */
	resumed: Resumable | null;
}

/**
 * Checks and opens what a run starts from. A config or an option that the engine refuses is reported before rows are encoded,
 * which may take long.
 */
export async function* openStart(
	native: Native,
	asked: AgentTrainingConfig,
	resumed: Resumable | null,
	signal: AbortSignal | null,
): AsyncGenerator<TrainEvent, Start> {
	// The rows that a resumed run reads first may not be those that have decided.
	const decided = resumed !== null && asked.images === "auto";
	const config = decided
		? ({ ...asked, images: trainsImages(resumed.state.fixed) ? "train" : "error" } as const)
		: asked;
	const { model, vision, ...found } = await findModel(config, resumed, native, signal);
	const device = chooseDevice(config.device, native);
	const { args, notices } = resolveForDevice(config, device.device);
	const smallest = engineOptions(args, device.device, { maxTokens: 1, maxSequences: 1 });
	const adapted = adaptedText(device.native.planMemory({ ...smallest, modelDir: model.path }));
	const weights = args.init_from_config ? "random weights" : `${bytesToTenth(model.weightBytes)} of weights`;
	yield { type: "check", name: "model", message: `${model.modelType}, ${weights}` };
	if (adapted !== null) yield { type: "check", name: "adapters", message: adapted };
	if (device.notice !== null) yield notice("warning", device.notice);
	for (const message of notices) yield notice("info", message);
	for (const message of found.missing) yield notice("warning", message);
	// A resumed run computes as it began, whatever the device is now.
	args.bf16 = !args.fp16 && resolveBf16(config.bf16, device.device, resumed && bf16Of(resumed.state.fixed));
	for (const message of resumed?.damaged ?? []) yield notice("warning", `skipped: ${message}`);
	if (config.resume_from_checkpoint !== null && resumed === null) {
		const where = config.output_dir;
		yield notice("warning", `there is no checkpoint in ${where} yet: the run starts from the beginning`);
	}
	const encoder = native.TextEncoder.open(found.textOptions);
	const text = encoder.info();
	yield { type: "check", name: "tokenizer", message: checkTokenizer(model, text) };
	if (resumed || !args.init_from_config) native.checkWeights(model.path);
	const { textOptions, chatTemplate } = found;
	return { args, model, device, encoder, text, textOptions, vision, chatTemplate, resumed };
}

interface FoundModel {
	model: ModelFolder;
	/** How rows become tokens. */
	textOptions: TextOptions;
	vision: Vision | null;
	chatTemplate: string | null;
	/** For the user: what comes from the checkpoint because the first model's folder lacks it. */
	missing: string[];
}

/** Throws `ARL_CONFIG` if the model cannot be trained, `ARL_IO` if a template cannot be read. */
async function findModel(
	args: AgentTrainingConfig,
	resumed: Resumable | null,
	native: Native,
	signal: AbortSignal | null,
): Promise<FoundModel> {
	const { model_name_or_path: base, chat_template: template } = args;
	// The checkpoint of an adapter has no model.
	const folder = hasAdapters(args) ? base : (resumed?.path ?? base);
	const found = await readModelFolder(folder, native);
	const model = resumed
		? { ...found, identity: await baseIdentity(base, modelIdentityOf(resumed.state.fixed)) }
		: found;
	// The first model's own tokenizer and template, where they still exist: then a change of them is noticed.
	const hasText = resumed === null || (await exists(join(base, "tokenizer.json")));
	const hasTemplate = resumed === null || template === null || (await exists(template));
	const file = hasTemplate ? template : join(resumed.path, "chat_template.jinja");
	// The processor that the run began with; a saved model has it too.
	const place = { path: hasText ? base : resumed.path, vision: model.vision };
	const vision = openVision({ native, options: args, model: place, cacheDir: cacheDir(args), signal });
	checkFreeze(args, model, args.images);
	const text = { ...textOptionsOf(args, model.maxPositionEmbeddings, vision), modelDir: place.path };
	const missing: string[] = [];
	if (!hasText) {
		missing.push(
			`model_name_or_path: ${base} does not exist any more: model, tokenizer and template are those of ${resumed.path}`,
		);
	}
	if (!hasTemplate) missing.push(`chat_template: ${template} does not exist any more: ${resumed.path} has its text`);
	return {
		model,
		vision,
		textOptions: file === null ? text : { ...text, chatTemplate: file },
		chatTemplate: file === null ? null : await readTemplate(file),
		missing,
	};
}

function readTemplate(file: string): Promise<string> {
	return readFile(file, "utf8").catch((error: unknown) => {
		throw toArlError(error);
	});
}
