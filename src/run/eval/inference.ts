/** The engine of a model that only generates: without gradients and moments. */
import type { ChosenDevice } from "../../device/index.js";
import type { NativeEngine } from "../../native.js";
import { type BatchSize, resolveBf16 } from "../setup/options.js";

/** Where and how the model computes. */
export interface InferenceOptions {
	device: ChosenDevice;
	bf16: boolean | "auto";
	/** Null: as many as the process may use. */
	threads: number | null;
}

/** Opens the engine. `size`: the prompts and replies that it holds from the start; for larger ones it reserves more. */
export function openForInference(modelDir: string, options: InferenceOptions, size: BatchSize): Promise<NativeEngine> {
	const { device, native } = options.device;
	return native.Engine.open({
		modelDir,
		device,
		dtype: resolveBf16(options.bf16, device) ? "bf16" : "f32",
		recompute: "block",
		...size,
		adamBeta1: 0.9,
		adamBeta2: 0.999,
		adamEpsilon: 1e-8,
		weightDecay: 0,
		inferenceOnly: true,
		...(options.threads !== null && { threads: options.threads }),
	});
}
