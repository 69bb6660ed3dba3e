/** The configuration of a run: schema, files, flags, resolution, and what is shown of it. */
export { defineConfig } from "./define.js";
export { environmentLayer } from "./environment.js";
export { findConfig, loadConfigFile } from "./file.js";
export { type ParsedFlags, parseFlags } from "./flags.js";
export {
	configJsonSchema,
	formatHelp,
	formatResolved,
	optionMeta,
	optionsMarkdown,
	resolvedAsJson,
	wrap,
} from "./print.js";
export { isResolved, type Layer, type Resolved, resolveConfig } from "./resolve.js";
export {
	type AgentTrainingConfig,
	type AgentTrainingConfigInput,
	OPTION_NAMES,
	type OptionName,
	trainingSchema,
} from "./schema.js";
export { redact, show } from "./values.js";
