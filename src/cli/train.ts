/** `arl train`: options from flags and a file, the run, its report, and how it ends. */
import { flag, formatResolved, type Resolved, resolvedAsJson } from "../config/index.js";
import { ArlError, EXIT_CODES, toArlError } from "../errors.js";
import type { Native } from "../native.js";
import { JsonReporter, jsonLine, type Reporter, TextReporter } from "../report/index.js";
import { readRecord } from "../report/runs/record.js";
import { closingLines } from "../report/runs/sentences.js";
import { isTerminal, wantsColor } from "../report/terminal.js";
import { resolveCommand, withOptions } from "./resolve.js";
import { onStopSignals } from "./signals.js";

const COMMAND = withOptions({
	name: "arl train",
	usage: "[CONFIG] [--OPTION VALUE ...]",
	about: `Fine-tunes a Qwen model on chat rows:
  arl train --model_name_or_path DIR --train_file rows.jsonl --output_dir out

CONFIG is a file of options. A flag wins over the file, the file over the default. Relative paths start at the working
directory.`,
	flags: {
		print_config: flag("Show every resolved option and where it comes from, and train nothing."),
		json: flag("Print one JSON event a line on stdout, and errors also as JSON logs on stderr."),
	},
	listsOptions: true,
});

async function makeReporter(json: boolean, plain: boolean): Promise<Reporter> {
	if (json) {
		const { LogReporter } = await import("../report/log.js");
		return new JsonReporter(process.stdout, new LogReporter());
	}
	const live = !plain && isTerminal(process.stderr);
	const trace = Boolean(process.env.ARL_DEBUG);
	return new TextReporter({ stream: process.stderr, live, color: wantsColor(process.stderr), trace });
}

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core?: () => Native): Promise<number> {
	// `--json` takes effect before anything else is read, so that errors of the options are JSON too.
	let reporter = await makeReporter(words.includes("--json"), true);
	try {
		const found = await resolveCommand(COMMAND, words);
		if (found === null) return 0;
		const { resolved, flags } = found;
		const { args, notices } = resolved;
		if (flags.print_config) {
			process.stdout.write(flags.json ? `${jsonLine(resolvedAsJson(resolved))}\n` : formatResolved(resolved));
			return 0;
		}
		reporter = await makeReporter(flags.json, args.disable_tqdm);
		for (const message of notices) reporter.event({ type: "notice", level: "info", message });
		return await train(args, reporter, core);
	} catch (thrown) {
		const error = toArlError(thrown);
		reporter.error(error);
		return error.exitCode;
	} finally {
		reporter.close();
	}
}

async function train(args: Resolved["args"], reporter: Reporter, core?: () => Native): Promise<number> {
	if (args.train_file.length === 0 && args.db_connection_string === null && args.dataset === null) {
		throw new ArlError(
			"ARL_USAGE",
			"no rows are given: train_file is missing, and so are dataset and db_connection_string",
			"For example --train_file rows.jsonl, or --dataset ./my-dataset.ts",
		);
	}
	const stop = onStopSignals((text) => reporter.note(text));
	try {
		const { createTrainer } = await import("../api/trainer.js");
		const trainer = createTrainer({ args }, core);
		let code = 0;
		for await (const event of trainer.run({ signal: stop.signal })) {
			reporter.event(event);
			if (event.type !== "end") continue;
			const record = readRecord(event.outputDir);
			if (record !== null) for (const line of closingLines(record, event.outputDir)) reporter.note(line);
			if (event.outcome === "interrupted") code = EXIT_CODES.ARL_INTERRUPTED;
		}
		return code;
	} finally {
		stop.release();
	}
}
