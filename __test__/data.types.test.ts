/** What an editor says of wrong fields: `tsc` fails where one of these is no error any more. */
import { describe, expect, it } from "vitest";
import { type ConvertRecordToData, type IndexedDataset, QwenTrainer, type RecordData } from "../src/index.js";

const args = { model_name_or_path: "m", output_dir: "o" };
const row: RecordData = { messages: [{ role: "user", content: "?" }], advantages: { 0: 1 }, reward: 1 };

const ofText = (raw: { q: string }) => ({ ...row, record_id: raw.q });
const ofRecord: ConvertRecordToData = ({ record, trajectory }) => (record && trajectory.length > 0 ? row : null);

/** Never called: only its types matter. */
function typed(): unknown[] {
	return [
		new QwenTrainer({ args, train_dataset: [row] }),
		new QwenTrainer({ args, train_dataset: { length: 1, get: () => row, identity: "v1" } }),
		new QwenTrainer({
			args,
			train_dataset: (async function* () {
				yield row;
			})(),
		}),
		new QwenTrainer({ args, convert_record_to_data_func: (raw: { q: string }) => [{ ...row, record_id: raw.q }] }),
		new QwenTrainer({ args, train_dataset: [{ q: "?" }], convert_record_to_data_func: ({ q }) => (q ? row : null) }),
		new QwenTrainer({
			args,
			train_dataset: [{ q: "?", a: "!" }],
			convert_record_to_data_func: ({ q, a }) => ({
				messages: [
					{ role: "user", content: q },
					{ role: "assistant", content: a },
				],
			}),
		}),
		// @ts-expect-error: no such role
		new QwenTrainer({ args, train_dataset: [{ messages: [{ role: "robot", content: "" }] }] }),
		// @ts-expect-error: no such field of a row
		new QwenTrainer({ args, train_dataset: [{ messages: [], advantage: {} }] }),
		// @ts-expect-error: no messages
		new QwenTrainer({ args, train_dataset: [{ prompt: "?" }] }),
		// @ts-expect-error: not a number
		new QwenTrainer({ args, train_dataset: [{ messages: [], reward: "1" }] }),
		// @ts-expect-error: no get
		new QwenTrainer({ args, train_dataset: { length: 1 } }),
		// @ts-expect-error: no such option
		new QwenTrainer({ args: { ...args, learning_rates: 1 } }),
		// @ts-expect-error: nothing but options
		new QwenTrainer({ args }, () => ({})),
		new QwenTrainer({ args, model: null, callbacks: [{ onStep: (_, control) => control.save() }] }),
		// @ts-expect-error: a row of the function is none
		new QwenTrainer({ args, convert_record_to_data_func: (raw: { q: string }) => ({ text: raw.q }) }),
		// @ts-expect-error: nothing is not null
		new QwenTrainer({ args, convert_record_to_data_func: () => undefined }),
		// @ts-expect-error: the function takes other rows than the data set has
		new QwenTrainer({ args, train_dataset: [{ q: 1 }], convert_record_to_data_func: ofText }),
		// @ts-expect-error: no such part of a message
		((): RecordData => ({ messages: [{ role: "user", content: [{ type: "image", url: "x" }] }] }))(),
		ofRecord,
		// @ts-expect-error: get gives rows
		((): IndexedDataset => ({ length: 1, get: () => "row" }))(),
	];
}

describe("the types of rows", () => {
	it("are those that the compiler checks in this file", () => {
		expect(typed).toBeTypeOf("function");
	});
});
