/** Asks the trained model, from code, a question that it was not trained on. */
import { Model } from "arl";

const model = await Model.open(process.argv[2] ?? "out");
const reply = model.chat([{ role: "user", content: "Rome 4" }], { maxNewTokens: 40 });
for await (const text of reply) process.stdout.write(text);
const { finishReason, completionTokens } = await reply.completion();
console.log(`\n${completionTokens} tokens, ${finishReason}`);
await model.close();
