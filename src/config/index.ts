/** The configuration of a run: schema, files, flags, resolution and display. */
export { optionsMarkdown, optionsTypescript } from "./docs.js";
export { environmentLayer } from "./environment.js";
export {
	choice,
	choiceOrNone,
	described,
	type Fields,
	flag,
	integer,
	integerOrNone,
	number,
	orNone,
	required,
	requiredString,
	string,
	stringOrNone,
	strings,
	type Values,
} from "./fields.js";
export { findConfig, loadConfigFile } from "./file.js";
export { checkFlags, type FlagSet, type OfferedFlag, offeredFlags, parseFlags } from "./flags.js";
export {
	configJsonSchema,
	formatFlags,
	formatOptions,
	formatResolved,
	resolvedAsJson,
	shownOptions,
	wrap,
} from "./print.js";
export { isResolved, type Layer, type Resolved, resolveConfig } from "./resolve.js";
export {
	type AgentTrainingConfig,
	type AgentTrainingConfigInput,
	defineConfig,
	OPTION_NAMES,
	type OptionName,
	trainingSchema,
} from "./schema.js";
export type { TrainingOptions } from "./training-options.js";
export { nearest, redact, show, soundsSecret } from "./values.js";
