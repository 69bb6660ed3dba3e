/** Rows looked at without training: all of them for what is wrong, or one as the model will see it. */
import type { AgentTrainingConfig, AgentTrainingConfigInput } from "../config/schema.js";
import type { ConvertRecordToData } from "../data/sources/convert.js";
import type { Dataset } from "../data/sources/custom.js";
import { loadNative } from "../native.js";
import { resolveArgs } from "../run/setup/options.js";
import { checkRows as check, type DataReport } from "./check-rows.js";
import { type InspectedRow, inspectRow as inspect } from "./inspect-row.js";

/** The options of a run, without the need of an `output_dir`. */
export type RowArguments =
	| AgentTrainingConfig
	| (Partial<Pick<AgentTrainingConfigInput, "output_dir">> & Omit<AgentTrainingConfigInput, "output_dir">);

/** Rows from code, as `QwenTrainer` takes them. */
export interface RowOptions<Row = unknown> {
	/** Rows in place of `train_file`, or, the last entry, next to it. */
	dataset?: Dataset<Row>;
	/** Makes rows of each raw row, of files as of `dataset`. */
	convert?: ConvertRecordToData<Row>;
	/** Aborting it ends the call with `ARL_INTERRUPTED`. */
	signal?: AbortSignal;
}

export interface CheckOptions<Row = unknown> extends RowOptions<Row> {
	/** Called now and then with the number of rows checked. */
	onProgress?: (rows: number, of: number) => void;
}

function input<Row>(args: RowArguments, { dataset, convert, signal }: RowOptions<Row>) {
	return {
		native: loadNative(),
		args: resolveArgs({ output_dir: ".", ...args }, dataset !== undefined).args,
		code: { dataset: dataset ?? null, convert: convert ?? null },
		signal: signal ?? null,
	};
}

/**
 * Checks every row that the options name, as `arl data check` does: bad rows, duplicates, lengths, what an epoch trains. Writes
 * nothing.
 *
 * @throws ArlError where the rows cannot be read at all; bad rows are in the report.
 */
export async function checkRows<Row>(args: RowArguments, options: CheckOptions<Row> = {}): Promise<DataReport> {
	const { onProgress: progress } = options;
	return check({ ...input(args, options), ...(progress && { progress }) });
}

/**
 * One row as the model will see it, as `arl inspect` shows it: its tokens, and which of them are trained. `row` counts over all
 * sources, from 0.
 *
 * @throws ArlError `ARL_DATA` with the row's place where it cannot be used.
 */
export async function inspectRow<Row>(
	args: RowArguments,
	row = 0,
	options: RowOptions<Row> = {},
): Promise<InspectedRow> {
	return inspect({ ...input(args, options), row });
}
