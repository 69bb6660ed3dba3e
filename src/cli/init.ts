/** `arl init`: makes a project: configuration, sample rows and package.json. Asks in a terminal, and never with `--yes`. */
import { readdir, writeFile } from "node:fs/promises";
import { basename, dirname, isAbsolute, join, relative, resolve } from "node:path";
import { choiceOrNone, flag, stringOrNone } from "../config/index.js";
import { exists, makeFolder } from "../disk/folders.js";
import { ArlError, EXIT_CODES, toArlError } from "../errors.js";
import { jsonLine } from "../report/index.js";
import { isTerminal } from "../report/terminal.js";
import { JSON_FLAG, parseCommand, version } from "./command.js";
import { projectFiles, TEMPLATES, type TemplateName } from "./init-templates.js";

const NAMES = Object.keys(TEMPLATES) as [TemplateName, ...TemplateName[]];
const MODEL = "Qwen/Qwen3-0.6B";
const SEEING_MODEL = "Qwen/Qwen3-VL-2B-Instruct";

/** The model of a newcomer. */
const usualModel = (template: TemplateName) => (template === "images" ? SEEING_MODEL : MODEL);

export const COMMAND = {
	name: "arl init",
	usage: "[DIR] [--template NAME] [--model MODEL] [--yes]",
	about: `Makes a project in DIR (default: the working directory): arl.config.ts, sample rows, package.json and a README. It replaces no
file. In a terminal it asks for what is not given.

${NAMES.map((name) => `  ${name.padEnd(10)}  ${TEMPLATES[name].about}`).join("\n")}`,
	words: { noun: "a folder", least: 0, most: 1 },
	flags: {
		template: choiceOrNone(NAMES, { description: "What the rows are; none: asks, or chat with --yes." }),
		model: stringOrNone({
			expects: "a folder, or OWNER/NAME of the Hugging Face Hub",
			literal: true,
			description: `The model to fine-tune; none: asks, or ${MODEL} with --yes, and ${SEEING_MODEL} for images.`,
		}),
		yes: flag("Ask nothing."),
		json: JSON_FLAG,
	},
};

/** What the user has chosen; null: nothing, as the user has left. */
type Answers = { folder: string; template: TemplateName; model: string } | null;

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[]): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const { flags } = given;
	const [folder] = given.words;
	const asks = !flags.yes && !flags.json && (folder === undefined || flags.template === null || flags.model === null);
	if (asks && !(isTerminal(process.stdout) && process.stdin.isTTY)) {
		const hint = "`arl init DIR --yes` asks nothing; --template and --model choose.";
		throw new ArlError("ARL_USAGE", "arl init asks questions, and this is no terminal", hint);
	}
	const known = { folder, template: flags.template ?? undefined, model: flags.model ?? undefined };
	const { template: kind = "chat", model: name = usualModel(kind) } = known;
	const answers: Answers = asks ? await ask(known) : { folder: folder ?? ".", template: kind, model: name };
	if (answers === null) return EXIT_CODES.ARL_INTERRUPTED;
	const { template, model } = answers;
	const target = resolve(answers.folder);
	// A local model is found from the project's folder too.
	const found = (await exists(model)) && !isAbsolute(model) ? relative(target, resolve(model)) : model;
	const files = projectFiles({ name: packageName(target), template, model: found, version: version() });
	const kept = await write(target, files);
	const steps = [
		...(target === process.cwd() ? [] : [`cd ${answers.folder}`]),
		"npm install",
		...TEMPLATES[template].steps,
	];
	const made = [...files.keys()].filter((path) => !kept.includes(path));
	if (flags.json) process.stdout.write(`${jsonLine({ folder: target, template, model, files: made, kept, steps })}\n`);
	else process.stdout.write(summary(target, made, kept, steps));
	return 0;
}

function summary(folder: string, made: readonly string[], kept: readonly string[], steps: readonly string[]): string {
	const lines = [`made in ${folder}:`, ...made.map((path) => `  ${path}`)];
	if (kept.length > 0) lines.push(`left as they are: ${kept.join(", ")}`);
	if (kept.includes("package.json"))
		lines.push(`  (its scripts call arl as in \`npx arl train\`; the dependency is arl ${version()})`);
	return `${[...lines, "", "next:", ...steps.map((step) => `  ${step}`)].join("\n")}\n`;
}

/** Asks for what is not known. */
async function ask(known: {
	folder?: string | undefined;
	template?: TemplateName | undefined;
	model?: string | undefined;
}): Promise<Answers> {
	// Loaded only by a call that asks.
	const { cancel, intro, isCancel, select, text } = await import("@clack/prompts");
	intro("arl init");
	const left = () => {
		cancel("Nothing was made.");
		return null;
	};
	const folder = known.folder ?? (await text({ message: "Which folder?", initialValue: "." }));
	if (isCancel(folder)) return left();
	const options = NAMES.map((value) => ({ value, label: value, hint: TEMPLATES[value].about }));
	const template = known.template ?? (await select({ message: "What are your rows?", options }));
	if (isCancel(template)) return left();
	const question = "Which model: a folder, or OWNER/NAME of the Hugging Face Hub?";
	const model = known.model ?? (await text({ message: question, initialValue: usualModel(template) }));
	if (isCancel(model)) return left();
	return { folder: folder || ".", template, model: model || usualModel(template) };
}

/** Files that a folder may have already, and that stay as they are. */
const KEPT = ["package.json", "README.md", ".gitignore"];

/** Writes the files. Returns those that are there and stay; any other that is there is an error before anything is written. */
async function write(folder: string, files: ReadonlyMap<string, string | Uint8Array>): Promise<string[]> {
	try {
		const there: string[] = [];
		for (const path of files.keys()) if (await exists(join(folder, path))) there.push(path);
		const kept = there.filter((path) => KEPT.includes(path));
		const names = await readdir(folder).catch(() => []);
		const configs = names.filter((name) => name.startsWith("arl.config.") && !there.includes(name));
		const taken = [...there.filter((path) => !KEPT.includes(path)), ...configs];
		if (taken.length > 0) {
			throw new ArlError("ARL_CONFIG", `${folder} has ${taken.join(", ")} already`, "Choose another folder.");
		}
		for (const [path, text] of files) {
			if (kept.includes(path)) continue;
			await makeFolder(dirname(join(folder, path)));
			await writeFile(join(folder, path), text, { flag: "wx" });
		}
		return kept;
	} catch (thrown) {
		throw toArlError(thrown);
	}
}

/** A name that npm accepts, of the folder's. */
function packageName(folder: string): string {
	const name = basename(folder)
		.toLowerCase()
		.replaceAll(/[^a-z0-9._-]+/g, "-")
		.replace(/^[._-]+|-+$/g, "");
	// A project must not have the name of its own dependency.
	return name === "" || name === "arl" ? "arl-project" : name;
}
