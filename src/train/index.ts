/** The trainer and its schedules: what the public interface and the command line take from here. */
export type { DatasetArguments } from "./code.js";
export { createSchedule, type Schedule, type ScheduleOptions, warmupSteps } from "./schedules.js";
export {
	QwenTrainer,
	type QwenTrainerOptions,
	type RunOptions,
	type TrainerCallback,
	type TrainerControl,
	type TrainResult,
} from "./trainer.js";
