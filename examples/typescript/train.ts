/** Trains on rows that this program makes, follows the run, and measures the replies with a metric of its own. */
import { QwenTrainer, type RecordData } from "arl";

/** A question whose reply is a JSON object. */
function row(city: string, degrees: number): RecordData {
	return {
		messages: [
			{ role: "user", content: `${city} ${degrees}` },
			{ role: "assistant", content: JSON.stringify({ city, degrees }) },
		],
	};
}

const cities = ["Paris", "Oslo", "Rome", "Lima", "Cairo", "Tokyo", "Accra", "Quito"];
const rows = cities.flatMap((city) => Array.from({ length: 10 }, (_, degrees) => row(city, degrees)));
const isHeldOut = (_: RecordData, i: number) => i % 7 === 3;

/** A text as JSON; null: it is none. */
function parsed(text: string): { degrees?: number } | null {
	try {
		return JSON.parse(text);
	} catch {
		return null;
	}
}

const trainer = new QwenTrainer({
	args: {
		model_name_or_path: "model",
		output_dir: "out",
		overwrite_output_dir: true,
		max_steps: 300,
		per_device_train_batch_size: 16,
		learning_rate: 1e-2,
		logging_steps: 20,
		eval_strategy: "steps",
		eval_steps: 20,
		eval_generate: 12,
		metric_for_best_model: "distance",
		greater_is_better: false,
		save_strategy: "best",
	},
	train_dataset: rows.filter((one, i) => !isHeldOut(one, i)),
	eval_dataset: rows.filter(isHeldOut),
	// The means over all replies are `eval_json` and `eval_distance`.
	eval_metric: (_row, reply) => {
		const [found, expected] = [parsed(reply.text), parsed(reply.expected)];
		const distance = Math.abs((found?.degrees ?? 100) - (expected?.degrees ?? 0));
		return { json: found === null ? 0 : 1, distance };
	},
	callbacks: [
		{
			onLog: ({ metrics }) => console.log(`step ${metrics.step}: loss ${metrics.loss.toFixed(4)}`),
			onEvaluate: ({ metrics }, control) => {
				const { step, eval_json: json = 0, eval_distance: distance = 0 } = metrics;
				console.log(`step ${step}: ${json.toFixed(2)} of the replies are JSON, ${distance.toFixed(2)} degrees off`);
				// Good enough: more steps are not needed.
				if (distance === 0) control.stop();
			},
		},
	],
});

const { outcome, steps } = await trainer.train();
console.log(`${outcome} after ${steps} steps`);
