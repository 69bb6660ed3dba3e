/** The entry `arl`: training, models that answer, and checks of rows, memory and devices without either. */
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
export type { NoticedRows } from "../data/tokens/notes.js";
export type { BadRow } from "../data/tokens/problems.js";
export { ArlError, type ErrorCode, type ErrorJson, EXIT_CODES, isErrorCode } from "../errors.js";
export type * from "../events.js";
export type { FetchProgress } from "../hub/index.js";
export { JsonReporter, type Reporter, TextReporter } from "../report/index.js";
export type { ModelEvaluation } from "../run/eval/evaluate-model.js";
export type { EvalFigures, EvalMetric, EvalReply } from "../run/eval/generation.js";
export { createSchedule, type Schedule, type ScheduleOptions, warmupSteps } from "../run/loop/schedules.js";
export type { DatasetArguments } from "../run/setup/user-modules.js";
export type { DataReport, DuplicateRows, EntryReport, OverLongRow } from "./check-rows.js";
export { type Device, devices } from "./devices.js";
export { type EvaluateOptions, evaluate } from "./evaluate.js";
export type { ImageReport } from "./image-counts.js";
export type { InspectedImage, InspectedRow, TokenText, TrainedSpan } from "./inspect-row.js";
export type { Bin, LengthSummary } from "./length-summary.js";
export { type ChatOptions, type GenerateOptions, Model, type ModelOptions } from "./model.js";
export {
	type MemoryCategory,
	type MemoryChange,
	type MemoryPlan,
	type PlanSize,
	planMemory,
	type SentBytes,
} from "./plan-memory.js";
export type { ChatCompletion, Completion, Reply } from "./reply.js";
export { type CheckOptions, checkRows, inspectRow, type RowArguments, type RowOptions } from "./rows.js";
export {
	QwenTrainer,
	type QwenTrainerOptions,
	type RunOptions,
	type TrainerCallback,
	type TrainerControl,
	type TrainResult,
} from "./trainer.js";
