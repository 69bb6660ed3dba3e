/** The commands of `arl`, and the exit code of each way that they end. */
import { providePublicApi } from "../config/module.js";
import { EXIT_MEANINGS, formatError, toArlError } from "../errors.js";
import { wantsColor } from "../report/terminal.js";
import { COMPLETE, type Group, runGroup, version } from "./command.js";

const MONGO: Group = {
	name: "arl mongo",
	summary: "Import rows into AgentRL's MongoDB collections, export them, and show what the database holds.",
	commands: {
		import: { summary: "Write rows of files into the database.", load: () => import("./mongo-import.js") },
		export: {
			summary: "Write rows of the database into a JSONL or Parquet file.",
			load: () => import("./mongo-export.js"),
		},
		status: { summary: "Show what the database holds, and missing indexes.", load: () => import("./mongo-status.js") },
	},
	notes: `\`arl train --db_connection_string mongodb://HOST/DB\` trains on these rows. In a clone, \`npm run mongo\` starts a
server for trying things out.`,
};

const DATA: Group = {
	name: "arl data",
	summary: "Check every row of every source, and train nothing.",
	commands: { check: { summary: "Report bad rows, lengths and duplicates.", load: () => import("./data-check.js") } },
};

const RUNS: Group = {
	name: "arl runs",
	summary: "List runs, show one, compare several, and send what a service has missed of one.",
	commands: {
		ls: { summary: "List the runs in folders.", load: () => import("./runs-ls.js") },
		show: { summary: "Show what a run reached, its checkpoints and options.", load: () => import("./runs-show.js") },
		diff: { summary: "Show how runs differ.", load: () => import("./runs-diff.js") },
		send: {
			summary: "Send what the services of report_to have missed of a run.",
			load: () => import("./runs-send.js"),
		},
	},
};

const CUDA: Group = {
	name: "arl cuda",
	summary: "Install NVIDIA's libraries for the CUDA addon without Python, and remove them.",
	commands: {
		install: { summary: "Fetch NVIDIA's libraries into arl's cache.", load: () => import("./cuda-install.js") },
		remove: { summary: "Remove them from arl's cache.", load: () => import("./cuda-remove.js") },
	},
};

const exits = Object.entries(EXIT_MEANINGS).map(([code, meaning]) => `  ${code.padStart(3)}  ${meaning}`);

const ARL: Group = {
	name: "arl",
	summary: "Supervised fine-tuning of Qwen models.",
	commands: {
		train: { summary: "Fine-tune a model on rows.", load: () => import("./train.js") },
		chat: { summary: "Chat with a model.", load: () => import("./chat.js") },
		generate: {
			summary: "Reply to a prompt, or generate the trained replies of rows and count the exact ones.",
			load: () => import("./generate.js"),
		},
		eval: { summary: "Evaluate held-out rows with one model or several.", load: () => import("./eval.js") },
		runs: RUNS,
		watch: { summary: "Show a run in the terminal as it goes.", load: () => import("./watch.js") },
		dashboard: { summary: "Show runs in a browser, live.", load: () => import("./dashboard.js") },
		merge: { summary: "Merge an adapter (LoRA) into its model.", load: () => import("./merge.js") },
		data: DATA,
		inspect: { summary: "Show one row as the model sees it.", load: () => import("./inspect.js") },
		images: { summary: "Replace the image URLs of rows by the images, as base64.", load: () => import("./images.js") },
		mongo: MONGO,
		plan: {
			summary: "Show the memory that a run takes, without rows, weights or a GPU.",
			load: () => import("./plan.js"),
		},
		doctor: { summary: "Show what this machine can do and what is missing.", load: () => import("./doctor.js") },
		cuda: CUDA,
		explain: { summary: "Explain an error code.", load: () => import("./explain.js") },
		init: { summary: "Make a project: configuration, sample rows, package.json.", load: () => import("./init.js") },
		completion: { summary: "Print a shell's completion script.", load: () => import("./completion.js") },
		schema: { summary: "Print the JSON Schema of a configuration file.", load: () => import("./schema.js") },
	},
	notes: `\`arl --version\` prints the version.\n\nExit codes:\n${exits.join("\n")}`,
};

/** Runs `arl` with the words after the program's name; gives the exit code. */
export async function main(words: readonly string[]): Promise<number> {
	providePublicApi(async () => (await import("../api/entries.js")).entries);
	try {
		if (words[0] === "--version" || words[0] === "-v") {
			process.stdout.write(`${version()}\n`);
			return 0;
		}
		if (words[0] === COMPLETE) {
			const { complete } = await import("./complete.js");
			process.stdout.write(await complete(ARL, words.slice(1)));
			return 0;
		}
		return await runGroup(ARL, words);
	} catch (thrown) {
		const error = toArlError(thrown);
		const trace = Boolean(process.env.ARL_DEBUG);
		process.stderr.write(formatError(error, { color: wantsColor(process.stderr), trace, explain: true }));
		return error.exitCode;
	}
}
