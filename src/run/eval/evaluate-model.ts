/** Evaluates models of folders on held-out rows, without training: the figures that a run reports, for each model. */
import type { AgentTrainingConfig } from "../../config/schema.js";
import { Scratch } from "../../data/sources/scratch.js";
import { chooseDevice } from "../../device/index.js";
import { ArlError, toArlError } from "../../errors.js";
import { type HighLoss, notice, type Sample, type TrainEvent } from "../../events.js";
import type { Native, NativeEngine } from "../../native.js";
import { openRows, type RowsFromCode } from "../setup/dataset.js";
import { fetchNamed } from "../setup/fetch.js";
import { openHeldOut } from "../setup/held-out.js";
import { readModelFolder } from "../setup/model.js";
import { mostImages, textOptions } from "../setup/options.js";
import { checkTokenizer } from "../setup/preflight.js";
import { Resources } from "../setup/resources.js";
import { openVision } from "../setup/vision.js";
import { type EvaluationFigures, evaluateRows, type HeldOut } from "./evaluate.js";
import { Generation } from "./generation.js";
import { openForInference } from "./inference.js";

export interface EvaluateModelInput {
	native: Native;
	/** Options of a run: its model, its held-out rows, and how they are read and computed. */
	args: AgentTrainingConfig;
	code: RowsFromCode;
	signal: AbortSignal | null;
}

/** What an evaluation of a model gave. */
export interface ModelEvaluation {
	model: string;
	/** Where the rows come from, for people. */
	source: string;
	rows: number;
	figures: EvaluationFigures;
	/** The rows with the highest mean loss, at most ten, the highest first. */
	highestLosses: HighLoss[];
	/** Seconds of the evaluation, without those of `eval_generate`. */
	seconds: number;
	/** With `eval_generate`: the generated replies. */
	samples: Omit<Sample, "step" | "epoch">[];
}

/** Evaluates the model that `args` names. Yields what a user should know of the rows. Writes nothing that stays. */
export async function* evaluateModel(input: EvaluateModelInput): AsyncGenerator<TrainEvent, ModelEvaluation> {
	const { native, code, signal } = input;
	const resources = new Resources();
	let failure: ArlError | null = null;
	try {
		const args = yield* fetchNamed(input.args, true, signal);
		const scratch = new Scratch(native, args.cache_dir);
		resources.add(() => scratch.close());
		const model = await readModelFolder(args.model_name_or_path, native);
		const folder = scratch.path();
		const vision = openVision({ native, options: args, model, cacheDir: args.cache_dir ?? folder, signal });
		resources.add(() => vision?.close());
		const options = textOptions(args, model.maxPositionEmbeddings, vision);
		checkTokenizer(model, native.TextEncoder.open(options).info());
		const start = { args: { ...args, cache_dir: folder }, textOptions: options, vision };
		const all = { native, args: start.args, code, signal, datasetId: null, readFirst: true };
		const rows = typeof args.eval_split === "number" ? await openRows(all) : null;
		resources.add(() => rows?.source.close());
		const heldOut = yield* openHeldOut({ native, start, code, cut: rows?.heldOut ?? null, signal, resources });
		if (heldOut === null) {
			throw new ArlError("ARL_CONFIG", "no held-out rows are given", "For example --eval_file heldout.jsonl");
		}
		const device = chooseDevice(args.device, native);
		if (device.notice !== null) yield notice("warning", device.notice);
		const generation = await openGeneration(input, heldOut);
		const computing = { device, bf16: args.bf16, threads: args.threads };
		const images = mostImages([heldOut.size, generation?.size ?? null]);
		const size = { ...heldOut.size, ...generation?.size, ...images };
		const engine = await openForInference(model.path, computing, size, heldOut.images === "train");
		resources.add(() => engine.close());
		const started = performance.now();
		const found = yield* evaluateRows(engine, heldOut, 0, signal);
		const seconds = (performance.now() - started) / 1000;
		const generated = found && (await generate(generation, engine, signal));
		if (found === null || generated === null) throw new ArlError("ARL_INTERRUPTED", "interrupted in the evaluation");
		const figures = { ...found.figures, ...generated.figures };
		const source = heldOut.data.source.name;
		return { ...found, model: input.args.model_name_or_path, source, figures, seconds, samples: generated.samples };
	} catch (error) {
		failure = toArlError(error);
		throw failure;
	} finally {
		// Throws the failure, with those to close as suppressed.
		await resources.close(failure);
	}
}

/** What `eval_generate` generates. Null: nothing. */
async function openGeneration(
	{ native, args, code }: EvaluateModelInput,
	heldOut: HeldOut,
): Promise<Generation | null> {
	const { eval_generate: rows, per_device_eval_batch_size: batchSize } = args;
	if (rows === 0) return null;
	return await Generation.open({ native, heldOut, rows, batchSize, metric: code.evalMetric ?? null });
}

/** The replies of `eval_generate`. Null: `signal` ended it. */
async function generate(
	generation: Generation | null,
	engine: NativeEngine,
	signal: AbortSignal | null,
): Promise<{ figures: Record<string, number>; samples: ModelEvaluation["samples"] } | null> {
	if (generation === null) return { figures: {}, samples: [] };
	const generated = await generation.run(engine, { step: 0, epoch: 0 }, signal ?? new AbortController().signal);
	return generated && { ...generated, samples: generated.samples.map(({ step: _, epoch: __, ...sample }) => sample) };
}
