/** The commands of `arl`, and the exit code of each way that they end. A command is loaded only when it is called. */
import { Command, CommanderError } from "commander";
import { providePublicApi } from "../config/module.js";
import { ArlError, EXIT_CODES, EXIT_MEANINGS, formatError, toArlError } from "../errors.js";
import { wantsColor } from "../report/terminal.js";
import { version } from "./version.js";

/** A command's module. */
interface CommandModule {
	/** Runs with the words after the command's name; gives the exit code. */
	run(words: string[]): Promise<number>;
}

interface CommandEntry {
	summary: string;
	load(): Promise<CommandModule>;
}

const COMMANDS: Readonly<Record<string, CommandEntry>> = {
	train: { summary: "fine-tune a model on rows", load: () => import("./train.js") },
	generate: {
		summary: "answer the trained replies of rows with a model, and count the exact ones",
		load: () => import("./generate.js"),
	},
	data: { summary: "check every row of every source, and train nothing", load: () => import("./data.js") },
	inspect: { summary: "show one row as the model will see it", load: () => import("./inspect.js") },
	images: {
		summary: "put the images that rows name by URL into the rows, as base64",
		load: () => import("./images.js"),
	},
	mongo: {
		summary: "rows into AgentRL's MongoDB collections and back, and what they hold",
		load: () => import("./mongo.js"),
	},
	plan: {
		summary: "show the memory that a run takes, without rows, weights or a GPU",
		load: () => import("./plan.js"),
	},
	doctor: { summary: "show what this machine can do and what is missing", load: () => import("./doctor.js") },
	schema: { summary: "print the JSON Schema of a configuration file", load: () => import("./schema.js") },
};

function program(done: (code: number) => void): Command {
	const exits = Object.entries(EXIT_MEANINGS).map(([code, meaning]) => `  ${code.padStart(3)}  ${meaning}`);
	const arl = new Command("arl")
		.description("Supervised fine-tuning of Qwen models.")
		.version(version(), "-v, --version")
		.enablePositionalOptions()
		.helpCommand("help [command]", "tell what a command takes")
		.configureHelp({ subcommandTerm: (command) => command.name() })
		.exitOverride()
		.showSuggestionAfterError(true)
		.configureOutput({ outputError: () => {} })
		.addHelpText("after", `\n\`arl COMMAND --help\` tells what a command takes.\n\nExit codes:\n${exits.join("\n")}`);
	for (const [name, entry] of Object.entries(COMMANDS)) {
		arl
			.command(name)
			.summary(entry.summary)
			.description(entry.summary)
			.argument("[words...]")
			.helpOption(false)
			.allowUnknownOption()
			.passThroughOptions()
			.exitOverride()
			.action(async (words: string[]) => done(await (await entry.load()).run(words)));
	}
	return arl;
}

/** Runs `arl` with the words after the program's name; gives the exit code. */
export async function main(given: readonly string[]): Promise<number> {
	providePublicApi(() => import("../api/index.js"));
	const [first = "", second] = given;
	// `arl help train` is `arl train --help`: each command writes its own help.
	const words = first === "help" ? [...(second === undefined ? [] : [second]), "--help"] : given;
	let code = 0;
	const arl = program((result) => {
		code = result;
	});
	try {
		if (words.length === 0) {
			process.stderr.write(arl.helpInformation());
			return EXIT_CODES.ARL_USAGE;
		}
		await arl.parseAsync([...words], { from: "user" });
		return code;
	} catch (thrown) {
		if (thrown instanceof CommanderError) {
			if (thrown.exitCode === 0) return 0;
			const [message = "", ...hints] = thrown.message.replace(/^error: /, "").split("\n");
			const hint = hints.join(" ").replace(/^\(|\)$/g, "");
			return fail(new ArlError("ARL_USAGE", message, hint || "`arl --help` lists the commands."));
		}
		return fail(toArlError(thrown));
	}
}

function fail(error: ArlError): number {
	process.stderr.write(
		formatError(error, { color: wantsColor(process.stderr), trace: Boolean(process.env.ARL_DEBUG) }),
	);
	return error.exitCode;
}
