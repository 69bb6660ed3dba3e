/** Runs on rows from code, on a fake core: the same rows as those of a workspace's file, in whatever form. */
import { readFileSync } from "node:fs";
import { createTrainer, type QwenTrainer } from "../../src/api/trainer.js";
import type { ConvertRecordToData } from "../../src/data/sources/convert.js";
import type { Dataset } from "../../src/data/sources/custom.js";
import type { RecordData } from "../../src/data/sources/record.js";
import type { Native } from "../../src/native.js";
import { fakeNative } from "./fake-native.js";
import type { Options } from "./run.js";

export interface Place {
	model: string;
	file: string;
	out: string;
}

/** The rows of a workspace's file. */
export function rowsOf(place: Place): RecordData[] {
	const lines = readFileSync(place.file, "utf8").trim().split("\n");
	return lines.map((line) => JSON.parse(line));
}

/** The options of `trainer` in run.ts, without rows. */
export function argsOf(place: Place, options: Options = {}) {
	return {
		model_name_or_path: place.model,
		output_dir: place.out,
		gradient_accumulation_steps: 3,
		num_train_epochs: 2,
		logging_steps: 1,
		save_strategy: "no" as const,
		...(options.max_tokens_per_micro_batch === undefined && { per_device_train_batch_size: 2 }),
		...options,
	};
}

/** A trainer on a data set. */
export function onDataset(
	place: Place,
	train_dataset: Dataset,
	options: Options = {},
	native: Native = fakeNative(),
): QwenTrainer {
	return createTrainer({ args: argsOf(place, options), train_dataset }, () => native);
}

/** A trainer on what a function makes of rows. */
export function onConverted<Row>(
	place: Place,
	convert: ConvertRecordToData<Row>,
	options: Options = {},
	native: Native = fakeNative(),
): QwenTrainer<Row> {
	const args = argsOf(place, { train_file: place.file, ...options });
	return createTrainer({ args, convert_record_to_data_func: convert }, () => native);
}

/** A data set that counts how often each row is asked for, in order. */
export function counted(rows: readonly RecordData[], identity?: string) {
	const asked: number[] = [];
	return {
		asked,
		length: rows.length,
		...(identity !== undefined && { identity }),
		get: (index: number) => {
			asked.push(index);
			return rows[index] as RecordData;
		},
	};
}

/** The rows one after the other, from the first each time; `taken` counts them. */
export function stream(rows: readonly RecordData[]) {
	const counts = { taken: 0 };
	return {
		counts,
		async *[Symbol.asyncIterator]() {
			for (const row of rows) {
				counts.taken += 1;
				yield row;
			}
		},
	};
}

/** A core that ends the run in step `step`, as if its process had been killed there. */
export function dyingAt(step: number, disk?: Parameters<typeof fakeNative>[1]): Native {
	return fakeNative(
		{
			onStep: (at) => {
				if (at === step) throw new Error("killed");
				return undefined;
			},
		},
		disk,
	);
}
