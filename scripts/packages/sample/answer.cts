// What a user's CommonJS may look like, written in TypeScript: requires the package, and lets a model answer.
import { Model } from "arl";

async function main(folder: string): Promise<void> {
	const model = await Model.open(folder);
	const { completionTokens } = await model.generate("Hello", { maxNewTokens: 4 }).completion();
	await model.close();
	console.log(JSON.stringify({ completionTokens }));
}
main(process.argv[2] ?? "");
