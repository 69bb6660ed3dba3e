/** Trains on rows that this program makes, follows the run, and measures the replies with a metric of its own. */
import { QwenTrainer, type RecordData } from "arl";

/** A question of which the reply is a JSON object. */
function row(city: string, degrees: number): RecordData {
	return {
		messages: [
			{ role: "user", content: `${city} ${degrees}` },
			{ role: "assistant", content: JSON.stringify({ city, degrees }) },
		],
	};
}

const cities = ["Paris", "Oslo", "Rome", "Lima", "Cairo", "Tokyo", "Accra", "Quito"];
const rows = cities.flatMap((city) => [3, 7, 9].map((degrees) => row(city, degrees)));

/** Whether a text is JSON; the share of such replies is reported as `eval_json`. */
function isJson(text: string): boolean {
	try {
		JSON.parse(text);
		return true;
	} catch {
		return false;
	}
}

const trainer = new QwenTrainer({
	args: {
		model_name_or_path: "model",
		output_dir: "out",
		overwrite_output_dir: true,
		max_steps: 120,
		per_device_train_batch_size: 12,
		learning_rate: 1e-2,
		logging_steps: 10,
		eval_strategy: "steps",
		eval_steps: 10,
		eval_generate: 8,
		metric_for_best_model: "json",
		save_strategy: "best",
	},
	train_dataset: rows,
	eval_dataset: cities.map((city) => row(city, 5)),
	eval_metric: (_row, reply) => ({ json: isJson(reply.text) ? 1 : 0 }),
	callbacks: [
		{
			onLog: ({ metrics }) => console.log(`step ${metrics.step}: loss ${metrics.loss.toFixed(4)}`),
			// All replies are JSON: more steps are not needed.
			onEvaluate: ({ metrics }, control) => {
				console.log(`step ${metrics.step}: ${metrics.eval_json} of the replies are JSON`);
				if (metrics.eval_json === 1) control.stop();
			},
		},
	],
});

const { outcome, steps } = await trainer.train();
console.log(`${outcome} after ${steps} steps`);
