/** The configuration: schema, resolution, files, flags. */
import type { AgentTrainingConfigInput } from "./schema.js";

export type { AgentTrainingConfig, AgentTrainingConfigInput, OptionName } from "./schema.js";
export { trainingSchema } from "./schema.js";

/** Gives an object of options its type; for `arl.config.ts` and for code. */
export function defineConfig<const T extends AgentTrainingConfigInput>(config: T): T {
	return config;
}
