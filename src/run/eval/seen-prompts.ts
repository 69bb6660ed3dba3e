/** Prompts with images, as the engine takes them. */
import type { GenerateOptions, ImagePixels, NativeEngine } from "../../native.js";

/** A prompt that an engine reads. */
export interface SeenPrompt {
	inputIds: Int32Array;
	/** Of its tokens; empty where it has no images. */
	positions: Int32Array;
	/** The pixels of its images. */
	images: readonly ImagePixels[];
}

/** Generates a reply to each prompt. */
export function generateFrom(
	engine: Pick<NativeEngine, "generate">,
	prompts: readonly SeenPrompt[],
	options: GenerateOptions,
	onToken?: (prompt: number, token: number) => void,
): Promise<Int32Array[]> {
	const ids = prompts.map(({ inputIds }) => inputIds);
	if (prompts.every(({ images }) => images.length === 0)) return engine.generate(ids, options, onToken);
	const seen = prompts.map(({ positions, images }) => ({
		positions,
		images: images.map(({ pixels, height, width }) => ({ pixels, height, width })),
	}));
	return engine.generate(ids, options, onToken, seen);
}
