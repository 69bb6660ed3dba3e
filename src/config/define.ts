/** Gives a user's object of options its type. */
import type { AgentTrainingConfigInput } from "./schema.js";

/** Gives an object of options its type and changes nothing; for `arl.config.ts` and for code. */
export function defineConfig<const T extends AgentTrainingConfigInput>(config: T): T {
	return config;
}
