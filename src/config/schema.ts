/**
 * THE schema: every option by its name, type, range, default and description. Types, flags, help, JSON Schema and the
 * table of options in docs/ all derive from it. Names are those of Hugging Face's TrainingArguments and TRL's SFTConfig,
 * and of AgentRL for what those lack.
 */
import { z } from "zod";
import { evaluation } from "./options/evaluation.js";
import { images } from "./options/images.js";
import { lora } from "./options/lora.js";
import { database, model, rows, text } from "./options/rows.js";
import { agentrl, checkpoints, devices, output } from "./options/run.js";
import { batch, optimizer, precision } from "./options/training.js";
import type { TrainingOptions } from "./training-options.js";

/** The options by their groups, in the order in which help shows them. */
export const GROUPS = {
	Model: model,
	Rows: rows,
	Images: images,
	Database: database,
	Text: text,
	"Batch and length of the run": batch,
	Optimizer: optimizer,
	LoRA: lora,
	"Precision and memory": precision,
	Evaluation: evaluation,
	Checkpoints: checkpoints,
	Output: output,
	"Several devices": devices,
	AgentRL: agentrl,
} as const;

/** The schema of a training run. Unknown keys are refused. */
export const trainingSchema = z.strictObject({
	...model,
	...rows,
	...images,
	...database,
	...text,
	...batch,
	...optimizer,
	...lora,
	...precision,
	...evaluation,
	...checkpoints,
	...output,
	...devices,
	...agentrl,
});

/** Options as a user writes them: in `arl.config.ts`, a file, or an object. */
export type AgentTrainingConfigInput = TrainingOptions;

/** Options as the trainer sees them: every one has a value. A mapped type, so that editors show each option's text here too. */
export type AgentTrainingConfig = {
	[Name in keyof TrainingOptions]-?: z.output<typeof trainingSchema>[Name];
};

/** The name of an option. */
export type OptionName = keyof AgentTrainingConfig;

/** Every option's name, in the order of the schema. */
export const OPTION_NAMES = Object.keys(trainingSchema.shape) as OptionName[];

/** Types an object of options and changes nothing; for `arl.config.ts` and for code. */
export function defineConfig(config: TrainingOptions): TrainingOptions {
	return config;
}
