/** The run of the tests of several ranks, which the real core trains within a second or two. */
import { join } from "node:path";
import { type Ended, flags, type Place, tinyPlace } from "./real.js";

export type Options = Record<string, string | number | boolean>;

/** A run takes a second or two on idle cores, and a launcher that does not start one gives up after a minute. */
export const LIMIT = 300_000;

export interface EightSteps {
	place: Place;
	/** What all runs have in common. */
	common: Options;
	/** The words of a run with these options, and its folder: a new one, if none is named. */
	train(options: Options, out?: string): { out: string; args: string[] };
}

/**
 * 8 steps: 26 rows in micro-batches of 2; where a step has four of them, the last step of an epoch has one alone. `more`: options that
 * all runs of a file of tests have.
 */
export function eightSteps(folder: string, more: Options): EightSteps {
	const place = tinyPlace(folder, 26);
	const common = {
		model_name_or_path: place.model,
		init_from_config: true,
		train_file: place.file,
		per_device_train_batch_size: 2,
		num_train_epochs: 2,
		learning_rate: 1e-3,
		max_length: 96,
		truncation: "left",
		logging_steps: 1,
		threads: 1,
		device: "cpu",
		...more,
	};
	let runs = 0;
	return {
		place,
		common,
		train(options, out = join(folder, `out-${runs++}`)) {
			return { out, args: ["train", ...flags({ ...common, output_dir: out, ...options })] };
		},
	};
}

/** The errors that a run has shown. */
export function errorsOf({ stderr }: Ended): string[] {
	return stderr.split("\n").filter((line) => /^\S*ARL_[A-Z]+ /.test(line));
}
