/** Opens the engine of a run, after checking that its memory is available. */
import { resolve } from "node:path";
import { meshText } from "../../config/mesh.js";
import { hostInfo } from "../../device/index.js";
import { toArlError } from "../../errors.js";
import { notice, type TrainEvent } from "../../events.js";
import type { DeviceInfo, EngineOptions, MemoryPlan, Native, NativeEngine } from "../../native.js";
import type { Ranks } from "../../ranks/ranks.js";
import type { SavingEngine } from "../checkpoint/checkpoint.js";
import { hasAdapters } from "./lora.js";
import { type Advice, advise, checkMemory, divideToFit, ofEveryStage, type Planner, withPlan } from "./memory.js";
import { type BatchSize, engineOptions, zeroText } from "./options.js";
import type { Resources } from "./resources.js";
import type { Start } from "./start.js";

/** An open engine. */
export interface Engine {
	native: NativeEngine;
	/** What checkpoints are made of: the model, or the adapter alone. */
	saving: SavingEngine;
	/** Writes the model with the adapter in a folder merged into it. */
	merge: (adapterDir: string, outDir: string) => Promise<void>;
	/** The options that it was opened with. */
	options: EngineOptions;
	/** The memory that it takes. */
	memory: MemoryPlan;
	/** The memory that an engine with such options would take. */
	plan: Planner;
	/** Changes that save memory, for an engine with such options. */
	advise: (options: EngineOptions) => Advice;
}

/**
 * Checks the memory, opens the engine, and restores the state that the run resumes from. `host`: the addon that knows the
 * machine's own memory. `ranks`: those that open one with this rank, and share its machine's memory.
 *
 * @throws ArlError `ARL_OOM` with the plan if the memory is not available.
 */
export async function* openEngine(
	{ args, device, model, text, chatTemplate, resumed }: Start,
	size: BatchSize,
	host: Native,
	resources: Resources,
	ranks: Ranks,
): AsyncGenerator<TrainEvent, Engine> {
	const plan = ofEveryStage(device.native.planMemory);
	const share = shareOf(device.info, ranks);
	const asked = { ...engineOptions(args, device.device, size), modelDir: model.path };
	const options = divideToFit(asked, args.zero, plan, share?.availableBytes);
	for (const message of [meshText(args), zeroText(args, options.zero ?? 0)])
		if (message !== null) yield notice("info", message);
	const memory = plan(options);
	const freedom = { packed: args.max_tokens_per_micro_batch !== null, resumed: resumed !== null };
	const adviseFor = (other: EngineOptions) => advise(other, plan, freedom);
	const advice = () => adviseFor(options);
	const message = checkMemory(memory, { device: share, host: hostInfo(host) }, advice);
	yield { type: "check", name: "memory", message };
	// Saved models prompt and stop as in training.
	const exported = { exportStopIds: text.stopIds, ...(chatTemplate !== null && { exportChatTemplate: chatTemplate }) };
	const opening = ranks.openEngine(device.native, { ...options, ...exported, restored: resumed !== null });
	const native = await opening.catch((error: unknown) => {
		throw withPlan(toArlError(error), memory, advice);
	});
	resources.add(() => native.close());
	const { notice: warning, exportChanges } = native.info();
	if (warning !== undefined) yield notice("warning", warning);
	for (const change of exportChanges) yield notice("info", change);
	const differs = resumed && (await native.restoreState(resumed.stateDir));
	if (differs) yield notice("warning", differs);
	const saving = hasAdapters(args) ? adapterOf(native, resolve(model.path)) : native;
	const merge = (adapterDir: string, outDir: string) => device.native.mergeAdapter(model.path, adapterDir, outDir);
	return { native, saving, merge, options, memory, plan, advise: adviseFor };
}

/** Saves an adapter where others save a model. `base`: what the adapter's configuration calls its model. */
function adapterOf(native: NativeEngine, base: string): SavingEngine {
	return {
		exportModel: (dir) => native.exportAdapter(dir, base),
		saveState: (dir) => native.saveState(dir),
	};
}

/** What one of the ranks on this machine may take of a device's memory. */
function shareOf(device: DeviceInfo | undefined, { localWorld }: Ranks): DeviceInfo | undefined {
	// Each rank has a GPU of its own.
	if (device?.device !== "cpu" || localWorld === 1) return device;
	const name = `${device.name}, for each of ${localWorld} ranks`;
	return {
		...device,
		name,
		availableBytes: device.availableBytes / localWorld,
		memoryBytes: device.memoryBytes / localWorld,
	};
}
