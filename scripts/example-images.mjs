// Trains the example of images from nothing, and fails where it answers fewer held-out questions than it should:
//
//   npm run example:images [-- STEPS]
import { spawnSync } from "node:child_process";
import { mkdirSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const example = join(root, "examples", "images");
const folder = join(root, "out", "example-images");
const [steps = "600"] = process.argv.slice(2);
/** The share of held-out questions that are answered exactly. */
const WANTED = 0.9;

rmSync(folder, { recursive: true, force: true });
mkdirSync(folder, { recursive: true });

/** Runs a program of Node in the folder; returns what it prints on stdout. */
function node(words, shows = true) {
	const { status, stdout } = spawnSync(process.execPath, words, {
		cwd: folder,
		encoding: "utf8",
		stdio: ["ignore", "pipe", "inherit"],
		maxBuffer: 1 << 28,
	});
	if (shows) process.stdout.write(stdout);
	if (status !== 0) process.exit(status ?? 1);
	return stdout;
}
const arl = (words, shows) => node([join(root, "dist", "cli", "main.js"), ...words], shows);

const started = performance.now();
node([join(example, "make-pictures.mjs")]);
node([join(root, "examples", "make-model.mjs"), "model", "--sees"]);
const training = [
	"--model_name_or_path",
	"model",
	"--init_from_config",
	"--train_file",
	"train.jsonl",
	"--image_root",
	".",
];
const batch = ["--per_device_train_batch_size", "32", "--max_steps", steps, "--learning_rate", "2e-3"];
const schedule = [
	"--lr_scheduler_type",
	"cosine",
	"--warmup_steps",
	"50",
	"--logging_steps",
	"100",
	"--save_strategy",
	"no",
];
arl(["train", ...training, "--output_dir", "out", ...batch, ...schedule]);
const asked = ["--model_name_or_path", "out", "--prompt_file", "heldout.jsonl", "--image_root", ".", "--json"];
const lines = arl(["generate", ...asked], false)
	.trim()
	.split("\n");
const { exactReplies, replies } = JSON.parse(lines.at(-1) ?? "{}");
const seconds = (performance.now() - started) / 1000;
const share = exactReplies / replies;
console.log(
	`${exactReplies} of ${replies} held-out questions answered exactly (${(100 * share).toFixed(1)} %), ${seconds.toFixed(0)} s`,
);
if (!(share > WANTED)) process.exit(1);
