/** Runs that follow a database in tests: as processes, with rows that arrive while they run. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { setTimeout as pause } from "node:timers/promises";
import { type Document, ObjectId } from "mongodb";
import { arl, type Ended, flags, metricsOf, type Place } from "./real.js";

export const LEASE_SECONDS = 4;
export const STEP_ROWS = 4;

/** Rows of a file as documents, in the file's order. */
export function documentsOf(file: string): (Document & { _id: ObjectId })[] {
	const lines = readFileSync(file, "utf8").trimEnd().split("\n");
	return lines.map((line, i) => ({
		// Ids in the order of the rows, whichever of them are inserted together.
		_id: new ObjectId((0x650000000000 + i).toString(16).padEnd(24, "0")),
		...JSON.parse(line),
		split: "train",
		fetched: false,
	}));
}

export const options = (place: Place, more: Record<string, string | number | boolean> = {}) =>
	flags({
		model_name_or_path: place.model,
		output_dir: place.out,
		init_from_config: true,
		per_device_train_batch_size: 2,
		gradient_accumulation_steps: STEP_ROWS / 2,
		train_sampling_strategy: "sequential",
		learning_rate: 1e-2,
		lr_scheduler_type: "constant",
		logging_steps: 1,
		save_steps: 2,
		threads: 1,
		...more,
	});

/** The numbers that a run logged, without times and without the part of an epoch, which a run without an end does not have. */
export const logged = (out: string) =>
	metricsOf(out).map(({ step, loss, grad_norm, learning_rate, num_tokens }) => {
		return { step, loss, grad_norm, learning_rate, num_tokens };
	});

export const lastCheckpoint = (out: string): number => {
	const names = existsSync(out) ? readdirSync(out) : [];
	return Math.max(0, ...names.map((name) => Number(/^checkpoint-(\d+)$/.exec(name)?.[1] ?? 0)));
};

export async function until(what: string, condition: () => boolean | Promise<boolean>): Promise<void> {
	for (let i = 0; i < 1200; i++) {
		if (await condition()) return;
		await pause(50);
	}
	throw new Error(`waited in vain until ${what}`);
}

/** A run in progress. */
export function going(args: string[]): { ended: Promise<Ended>; kill: (signal: NodeJS.Signals) => void } {
	let kill: (signal: NodeJS.Signals) => void = () => {};
	const ended = arl(args, (given) => {
		kill = given;
	});
	return { ended, kill: (signal) => kill(signal) };
}
