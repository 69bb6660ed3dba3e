// What a user's TypeScript may look like: trains for three steps, lets the model answer, and reads an error's code.
import { ArlError, type ChatMessage, defineConfig, Model, QwenTrainer } from "arl";
import { loadImage } from "arl/images";
import { databaseStatus } from "arl/mongo";

const [assets = "", output = ""] = process.argv.slice(2);
const args = defineConfig({
	model_name_or_path: `${assets}/model`,
	train_file: `${assets}/train.jsonl`,
	output_dir: output,
	max_steps: 3,
	logging_steps: 1,
});
const steps: number[] = [];
const trainer = new QwenTrainer({ args });
for await (const event of trainer.run()) {
	if (event.type === "step") steps.push(event.step);
}
const model = await Model.open(output);
const messages: ChatMessage[] = [{ role: "user", content: "Hello" }];
const { completionTokens } = await model.chat(messages, { maxNewTokens: 4 }).completion();
await model.close();
const code = await Model.open(`${output}/nothing`).then(
	() => "opened",
	(error: unknown) => (error instanceof ArlError ? error.code : "another error"),
);
console.log(JSON.stringify({ steps, completionTokens, code, more: [typeof loadImage, typeof databaseStatus] }));
