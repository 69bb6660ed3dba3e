/** One reply of an engine as a stream of text. */
import { ArlError } from "../../errors.js";
import type { GenerateOptions, NativeEngine } from "../../native.js";
import { generateFrom, type SeenPrompt } from "./seen-prompts.js";
import { TextStream } from "./text-stream.js";

/** A reply that has ended. */
export interface GeneratedText {
	text: string;
	/** The new tokens, without the one that ended the reply. */
	tokens: number[];
	/** `stop`: the model's end token, or a stop text. `length`: the bound of new tokens. */
	finishReason: "stop" | "length";
}

export interface GenerateTextInput {
	engine: Pick<NativeEngine, "generate" | "interrupt" | "discardStep">;
	decode: (ids: Int32Array) => string;
	prompt: SeenPrompt;
	options: GenerateOptions;
	/** Texts that end the reply, and are no part of it. */
	stop: readonly string[];
	/** Receives the text as it comes; never empty. */
	push: (text: string) => void;
	/** Aborting it ends the reply within a token. */
	signal: AbortSignal;
}

/** Generates. Rejects with `ARL_INTERRUPTED` where `signal` ended it. The engine must be idle, and stay with this call alone. */
export async function generateText(input: GenerateTextInput): Promise<GeneratedText> {
	const { engine, options, signal } = input;
	const stream = new TextStream(input.decode, input.stop);
	const tokens: number[] = [];
	let text = "";
	let failure: unknown = null;
	const emit = (part: string) => {
		if (part === "") return;
		text += part;
		input.push(part);
	};
	let ended = false;
	let interrupted = false;
	const interrupt = () => {
		ended = true;
		interrupted = true;
		engine.interrupt();
	};
	// What is thrown in a callback of the addon would end the process.
	const onToken = (id: number) => {
		if (ended) return;
		try {
			tokens.push(id);
			emit(stream.push(id));
			if (stream.stopped) interrupt();
		} catch (error) {
			failure = error;
			interrupt();
		}
	};
	if (signal.aborted) throw interruption(signal);
	signal.addEventListener("abort", interrupt);
	try {
		const [all = new Int32Array()] = await generateFrom(engine, [input.prompt], options, (_, id) => onToken(id));
		// The promise may overtake the last tokens.
		for (const id of all.subarray(tokens.length)) onToken(id);
	} catch (error) {
		if (!interrupted) throw error;
	} finally {
		ended = true;
		signal.removeEventListener("abort", interrupt);
		// Where generation had ended already, the interrupt must not hit the next one.
		if (interrupted) await engine.discardStep();
	}
	if (failure !== null) throw failure;
	if (signal.aborted) throw interruption(signal);
	emit(stream.end());
	const stopped = stream.stopped || tokens.length < options.maxNewTokens;
	return { text, tokens, finishReason: stopped ? "stop" : "length" };
}

function interruption(signal: AbortSignal): ArlError {
	return new ArlError("ARL_INTERRUPTED", "the reply was interrupted", "", { cause: signal.reason });
}
