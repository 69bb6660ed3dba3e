/** `arl train`: options from flags and a file, the run, its report, and how it ends. */

import { flag, formatResolved, type Resolved, resolvedAsJson } from "../config/index.js";
import { findCuda } from "../device/cuda.js";
import { ArlError, EXIT_CODES, toArlError } from "../errors.js";
import { writeErrorFile } from "../launch/error-file.js";
import { launchOf } from "../launch/launch.js";
import { starter, startRanks } from "../launch/start.js";
import { loadNative, type Native } from "../native.js";
import { ALONE, type Ranks } from "../ranks/ranks.js";
import { JsonReporter, jsonLine, type Reporter, TextReporter } from "../report/index.js";
import { readRecord } from "../report/runs/record.js";
import { closingLines } from "../report/runs/sentences.js";
import { isTerminal, wantsColor } from "../report/terminal.js";
import { RankedRun } from "./ranks.js";
import { resolveCommand, withOptions } from "./resolve.js";
import { onStopSignals } from "./signals.js";

export const COMMAND = withOptions({
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
	return new TextReporter({ stream: process.stderr, live, color: wantsColor(process.stderr), trace, explain: true });
}

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core?: () => Native): Promise<number> {
	// `--json` takes effect before anything else is read, so that errors of the options are JSON too.
	let reporter = await makeReporter(words.includes("--json"), true);
	let ranked: RankedRun | null = null;
	try {
		const launch = launchOf(process.env, gpusOfPod(process.env, core));
		if (launch.world > 1) {
			// First of all: from here on a rank that fails can tell the others.
			ranked = await RankedRun.open(launch, core, namesCpu(words));
			if (ranked.hub === null) return await ranked.serve(() => resolveRun(words, launch.world));
		}
		const found = await resolveRun(words, launch.world);
		if (found === null) return 0;
		const { resolved, flags } = found;
		const { args, notices } = resolved;
		if (flags.print_config) {
			process.stdout.write(flags.json ? `${jsonLine(resolvedAsJson(resolved))}\n` : formatResolved(resolved));
			return 0;
		}
		reporter = await makeReporter(flags.json, args.disable_tqdm);
		for (const message of notices) reporter.event({ type: "notice", level: "info", message });
		if (launch.world === 1 && args.nproc_per_node > 1) {
			const started = starter(args.nproc_per_node, usesGpus(args.device, core));
			return await startRanks(started, commandLine());
		}
		if (ranked !== null) reporter.event({ type: "notice", level: "info", message: await ranked.agree(launch, args) });
		const code = await train(args, reporter, ranked, core);
		if (ranked !== null) ranked.code = code;
		return code;
	} catch (thrown) {
		const error = toArlError(thrown);
		reporter.error(error);
		// What follows from another rank's failure, that rank has written.
		if (ranked?.hub?.hasFailed !== true) writeErrorFile(error);
		await ranked?.abandon(error);
		return error.exitCode;
	} finally {
		reporter.close();
		await ranked?.end();
	}
}

/** The options of the run, on as many ranks as were started. */
function resolveRun(words: readonly string[], world: number) {
	return resolveCommand(COMMAND, words, {}, () => world);
}

/** Whether the command line itself says `--device cpu`: the configuration is read only when ranks are connected. */
function namesCpu(words: readonly string[]): boolean {
	return words.some((word, i) => word === "--device=cpu" || (word === "--device" && words[i + 1] === "cpu"));
}

/** Whether ranks that are started here will compute on GPUs. */
function usesGpus(device: string, core: () => Native = loadNative): boolean {
	return device.startsWith("cuda") || (device === "auto" && findCuda(core(), device).problem === null);
}

/** How many GPUs a pod sees whose RANK may number pods; 0 elsewhere: nothing is looked for. */
function gpusOfPod(env: NodeJS.ProcessEnv, core: () => Native = loadNative): number {
	const asked = env.KUBERNETES_SERVICE_HOST !== undefined && env.RANK !== undefined && env.LOCAL_RANK === undefined;
	return asked ? findCuda(core(), "cuda").report.devices.length : 0;
}

/** How this process was started: each rank is started so. */
function commandLine(): string[] {
	return [process.execPath, ...process.execArgv, ...process.argv.slice(1)];
}

async function train(
	args: Resolved["args"],
	reporter: Reporter,
	ranked: RankedRun | null,
	core?: () => Native,
): Promise<number> {
	if (args.train_file.length === 0 && args.db_connection_string === null && args.dataset === null) {
		throw new ArlError(
			"ARL_USAGE",
			"no rows are given: train_file is missing, and so are dataset and db_connection_string",
			"For example --train_file rows.jsonl, or --dataset ./my-dataset.ts",
		);
	}
	const stop = onStopSignals((text) => reporter.note(text), ranked?.hub ?? null);
	try {
		const { createTrainer } = await import("../api/trainer.js");
		const ranks: Ranks = ranked?.hub ?? ALONE;
		const trainer = createTrainer({ args }, core, ranks);
		const events = trainer.run({ signal: stop.signal });
		let code = 0;
		for await (const event of ranked?.hub?.untilFailure(events) ?? events) {
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
