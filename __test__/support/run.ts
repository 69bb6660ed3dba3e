/** Short runs for tests: a fake model, a few rows, and the trainer on a fake core. */
import { mkdirSync, mkdtempSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createTrainer, type QwenTrainer, type RunOptions } from "../../src/api/trainer.js";
import type { AgentTrainingConfigInput } from "../../src/config/schema.js";
import type { EventOf, TrainEvent } from "../../src/events.js";
import type { Native } from "../../src/native.js";
import { fakeNative, writeFakeModel } from "./fake-native.js";

export const chatRow = (text: string) =>
	JSON.stringify({
		messages: [
			{ role: "user", content: "?" },
			{ role: "assistant", content: text },
		],
	});

/** A folder with a fake model and `rows` rows of different lengths. */
export function workspace(parent: string, rows = 22): { model: string; file: string; out: string } {
	const folder = mkdtempSync(join(parent, "run-"));
	const model = join(folder, "model");
	mkdirSync(model);
	writeFakeModel(model);
	const file = join(folder, "rows.jsonl");
	const lines = Array.from({ length: rows }, (_, i) => chatRow(`answer ${i} ${"x".repeat((i * 7) % 13)}`));
	writeFileSync(file, `${lines.join("\n")}\n`);
	return { model, file, out: join(folder, "out") };
}

export type Options = Partial<AgentTrainingConfigInput>;

export function trainer(
	place: { model: string; file: string; out: string },
	options: Options = {},
	native: Native = fakeNative(),
): QwenTrainer {
	const args = {
		model_name_or_path: place.model,
		train_file: place.file,
		output_dir: place.out,
		gradient_accumulation_steps: 3,
		num_train_epochs: 2,
		logging_steps: 1,
		save_strategy: "no" as const,
		...(options.max_tokens_per_micro_batch === undefined && { per_device_train_batch_size: 2 }),
		...options,
	};
	return createTrainer({ args }, () => native);
}

/** All events of a run. */
export async function events(run: QwenTrainer, options: RunOptions = {}): Promise<TrainEvent[]> {
	const all: TrainEvent[] = [];
	for await (const event of run.run(options)) all.push(event);
	return all;
}

export function ofType<T extends TrainEvent["type"]>(all: TrainEvent[], type: T): EventOf<T>[] {
	return all.filter((event): event is EventOf<T> => event.type === type);
}

/** What must be equal between two runs that did the same: everything but times and memory. */
export function numbers(all: TrainEvent[]) {
	return ofType(all, "log").map(({ metrics }) => {
		const { step, epoch, loss, grad_norm, learning_rate, mean_token_accuracy, entropy, num_tokens } = metrics;
		return { step, epoch, loss, grad_norm, learning_rate, mean_token_accuracy, entropy, num_tokens };
	});
}
