/** The figures of held-out rows by a model, without training. */
import type { ConvertRecordToData } from "../data/sources/convert.js";
import { checkDataset, type Dataset } from "../data/sources/custom.js";
import type { RecordData } from "../data/sources/record.js";
import { loadNative } from "../native.js";
import { evaluateModel, type ModelEvaluation } from "../run/eval/evaluate-model.js";
import type { EvalMetric } from "../run/eval/generation.js";
import { resolveArgs } from "../run/setup/options.js";
import type { RowArguments } from "./rows.js";

export interface EvaluateOptions<Row = unknown> {
	/** Held-out rows, after those of `args.eval_file`. */
	eval_dataset?: Dataset<Row>;
	/** Makes rows of each raw row, of files as of `eval_dataset`. */
	convert?: ConvertRecordToData<Row>;
	/** A metric of the replies that `args.eval_generate` generates. */
	eval_metric?: EvalMetric<RecordData>;
	/** Aborting it ends the call with `ARL_INTERRUPTED`. */
	signal?: AbortSignal;
	/** Called with what a user should know of the rows and the device. */
	onNotice?: (message: string) => void;
}

/**
 * Evaluates the held-out rows of the options with the model that they name, as `arl eval` does. Writes nothing.
 *
 * @throws ArlError where a row cannot be used, the folder holds no model, or the memory does not suffice.
 */
export async function evaluate<Row>(args: RowArguments, options: EvaluateOptions<Row> = {}): Promise<ModelEvaluation> {
	const { eval_dataset: dataset, convert, eval_metric: evalMetric, signal, onNotice } = options;
	if (dataset !== undefined) checkDataset(dataset, "eval_dataset");
	const evaluation = evaluateModel({
		native: loadNative(),
		args: resolveArgs({ output_dir: ".", ...args }, true).args,
		code: { dataset: null, convert: convert ?? null, evalDataset: dataset ?? null, evalMetric: evalMetric ?? null },
		signal: signal ?? null,
	});
	for (;;) {
		const { done, value } = await evaluation.next();
		if (done) return value;
		if (value.type === "notice") onNotice?.(value.message);
	}
}
