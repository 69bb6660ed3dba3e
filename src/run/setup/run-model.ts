/**
 * Where a run takes model and text from: the folder that the options name, or, resumed, the checkpoint, which is a whole
 * model. So the first model may be gone by then; where it is still there, it must be the same.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { exists } from "../../disk/folders.js";
import { toArlError } from "../../errors.js";
import type { Native, TextOptions } from "../../native.js";
import type { Resumable } from "../checkpoint/checkpoint.js";
import { modelIdentityOf } from "../checkpoint/state.js";
import { baseIdentity, type ModelFolder, readModelFolder } from "./model.js";
import { textOptions } from "./options.js";

export interface RunModel {
	/** The folder that the engine is opened on; its identity is that of the model that the run began with. */
	model: ModelFolder;
	/** How rows become tokens. */
	textOptions: TextOptions;
	/** The template that renders the rows, where it replaces the model's. */
	chatTemplate: string | null;
	/** For the user: what is taken from the checkpoint because it is gone elsewhere. */
	notices: string[];
}

/** Throws `ARL_CONFIG` where a folder is not that of a model that can be trained, `ARL_IO` where a template cannot be read. */
export async function openRunModel(
	args: AgentTrainingConfig,
	resumed: Resumable | null,
	native: Pick<Native, "modelConfig">,
): Promise<RunModel> {
	const { model_name_or_path: base, chat_template: template } = args;
	const found = await readModelFolder(resumed?.path ?? base, native);
	const model = resumed
		? { ...found, identity: await baseIdentity(base, modelIdentityOf(resumed.state.fixed)) }
		: found;
	// The first model's own tokenizer and template, where they are there: then a change of them is noticed.
	const hasText = resumed === null || (await exists(join(base, "tokenizer.json")));
	const hasTemplate = resumed === null || template === null || (await exists(template));
	const modelDir = hasText ? base : resumed.path;
	const file = hasTemplate ? template : join(resumed.path, "chat_template.jinja");
	const text = { ...textOptions(args, model.maxPositionEmbeddings), modelDir };
	return {
		model,
		textOptions: file === null ? text : { ...text, chatTemplate: file },
		chatTemplate: file === null ? null : await readTemplate(file),
		notices: [
			...(hasText
				? []
				: [
						`model_name_or_path: ${base} is not there any more: model, tokenizer and template are those of ${resumed.path}`,
					]),
			...(hasTemplate ? [] : [`chat_template: ${template} is not there any more: ${resumed.path} has its text`]),
		],
	};
}

function readTemplate(file: string): Promise<string> {
	return readFile(file, "utf8").catch((error: unknown) => {
		throw toArlError(error);
	});
}
