/** The engine of a run: what it is made of, and the memory that it takes, which is checked before anything is loaded. */
import { type ChosenDevice, hostInfo } from "../../device/index.js";
import { toArlError } from "../../errors.js";
import type { TrainEvent } from "../../events.js";
import type { EngineOptions, MemoryPlan, Native, NativeEngine } from "../../native.js";
import type { Resumable } from "../checkpoint/checkpoint.js";
import { type Advice, advise, checkMemory, withPlan } from "./memory.js";
import { type BatchSize, engineOptions, type ResolvedConfig } from "./options.js";

/** An engine that is open. */
export interface OpenEngine {
	engine: NativeEngine;
	/** What it is made of. */
	engineOptions: EngineOptions;
	/** The memory that it takes. */
	memory: MemoryPlan;
	/** What would save memory, for an engine with such options. */
	advise: (options: EngineOptions) => Advice;
}

export interface OpenEngineInput {
	args: ResolvedConfig;
	/** The addon that knows the machine. */
	native: Native;
	chosen: ChosenDevice;
	size: BatchSize;
	resumed: Resumable | null;
	/** The model's folder. */
	modelDir: string;
	/** What saved models have to say of how they were trained. */
	exported: Pick<EngineOptions, "exportChatTemplate" | "exportStopIds">;
}

/** Checks the memory, and opens the engine. Throws `ARL_OOM` with the plan where the memory is not there. */
export async function* openEngine(input: OpenEngineInput): AsyncGenerator<TrainEvent, OpenEngine> {
	const { args, native, chosen, resumed } = input;
	const options = { ...engineOptions(args, chosen.device, input.size), modelDir: input.modelDir };
	const memory = chosen.native.planMemory(options);
	const freedom = { packed: args.max_tokens_per_micro_batch !== null, resumed: resumed !== null };
	const adviseFor = (other: EngineOptions) => advise(other, chosen.native.planMemory, freedom);
	const advice = () => adviseFor(options);
	const message = checkMemory(memory, { device: chosen.info, host: hostInfo(native) }, advice);
	yield { type: "check", name: "memory", message };
	const opened = chosen.native.Engine.open({ ...options, ...input.exported, restored: resumed !== null });
	const engine = await opened.catch((error: unknown) => {
		throw withPlan(toArlError(error), memory, advice);
	});
	const { notice, exportChanges } = engine.info();
	if (notice !== undefined) yield { type: "notice", level: "warning", message: notice };
	for (const message of exportChanges) yield { type: "notice", level: "info", message };
	return { engine, engineOptions: options, memory, advise: adviseFor };
}
