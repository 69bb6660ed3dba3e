/** The public API of `arl`, all of it. */
export {
	type AgentTrainingConfig,
	type AgentTrainingConfigInput,
	configJsonSchema,
	defineConfig,
	type Layer,
	loadConfigFile,
	type OptionName,
	type Resolved,
	resolveConfig,
} from "./config/index.js";
export * from "./data/index.js";
export { ArlError, type ErrorCode, type ErrorJson, EXIT_CODES, isErrorCode } from "./errors.js";
export type * from "./events.js";
export * from "./images/index.js";
export { JsonReporter, type Reporter, TextReporter } from "./report/index.js";
export * from "./train/index.js";
