// `npm start`: the main job on the built-in sample. Sets up, then runs two commands that anyone can run: `arl train` with
// the config in assets/, and `arl generate`, which answers the held-out prompts with the model before and after.

import { join } from "node:path";
import { orExplain, root, run, setup } from "./setup.mjs";

const config = join("assets", "quickstart.yaml");
const output = join("out", "quickstart");

/** Runs `arl` as a user would, and shows what was run. */
function arl(...args) {
	console.error(`\n$ npx arl ${args.join(" ")}`);
	run(process.execPath, [join(root, "dist", "cli", "main.js"), ...args]);
}

setup();
orExplain(() => {
	arl("train", "--config", config, "--output_dir", output);
	arl(
		"generate",
		"--model_name_or_path",
		join("assets", "model"),
		"--compare",
		output,
		"--prompt_file",
		join("assets", "heldout.jsonl"),
	);
	console.error(
		`\nthe trained model:  ${output}\nits metrics:        ${join(output, "metrics.jsonl")}\nits report:         ${join(output, "report.html")}`,
	);
});
