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
	type TrainingOptions,
} from "../config/index.js";
export * from "../data/index.js";
export { ArlError, type ErrorCode, type ErrorJson, EXIT_CODES, isErrorCode } from "../errors.js";
export type * from "../events.js";
export * from "../images/index.js";
export { JsonReporter, type Reporter, TextReporter } from "../report/index.js";
export { createSchedule, type Schedule, type ScheduleOptions, warmupSteps } from "../run/loop/schedules.js";
export type { DatasetArguments } from "../run/setup/user-modules.js";
export {
	QwenTrainer,
	type QwenTrainerOptions,
	type RunOptions,
	type TrainerCallback,
	type TrainerControl,
	type TrainResult,
} from "./trainer.js";
