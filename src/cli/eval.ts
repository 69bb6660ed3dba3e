/** `arl eval`: the figures of held-out rows by one model or several, without training. */
import pc from "picocolors";
import { FIGURES, namesHeldOut } from "../config/eval-sources.js";
import { flag, strings } from "../config/index.js";
import { ArlError } from "../errors.js";
import { loadNative, type Native } from "../native.js";
import { count, duration, jsonLine, measure, percent } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { downloadParts, evaluatingParts } from "../report/reporter.js";
import { wantsColor } from "../report/terminal.js";
import type { ModelEvaluation } from "../run/eval/evaluate-model.js";
import { resolveCommand, withOptions } from "./resolve.js";
import { stoppable } from "./signals.js";

export const COMMAND = withOptions({
	name: "arl eval",
	usage: "[CONFIG] [--OPTION VALUE ...]",
	about: `Evaluates held-out rows, and trains nothing:
  arl eval --model_name_or_path DIR --eval_file rows.jsonl

Takes the options of \`arl train\` (\`arl train --help\`); those on the model, held-out rows and text count. It needs no
output_dir and no train_file, and writes nothing. The figures are those of an evaluation while training.`,
	flags: {
		compare: strings({ expects: "folders", description: "More models, evaluated on the same rows." }),
		json: flag("Print a JSON line for each model, behind one for each reply of --eval_generate."),
	},
});

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const found = await resolveCommand(COMMAND, words, { output_dir: "." });
	if (found === null) return 0;
	const { resolved, flags } = found;
	const { args } = resolved;
	if (!namesHeldOut(args)) {
		throw new ArlError("ARL_USAGE", "no held-out rows are given", "For example --eval_file heldout.jsonl");
	}
	const live = liveLine(process.stderr);
	return stoppable(async (signal) => {
		const { loadCode } = await import("../run/setup/user-modules.js");
		const code = await loadCode(args, { dataset: null, convert: null });
		const { evaluateModel } = await import("../run/eval/evaluate-model.js");
		const results: ModelEvaluation[] = [];
		for (const model of [args.model_name_or_path, ...flags.compare]) {
			const evaluation = evaluateModel({ native: core(), args: { ...args, model_name_or_path: model }, code, signal });
			for (;;) {
				const { done, value } = await evaluation.next();
				if (done) {
					results.push(value);
					break;
				}
				if (value.type === "download") live?.show(downloadParts(value));
				if (value.type === "evaluating") live?.show(evaluatingParts(value));
				if (value.type === "notice") process.stderr.write(`${value.message}\n`);
			}
			live?.clear();
			const last = results.at(-1);
			if (!flags.json || last === undefined) continue;
			for (const sample of last.samples) process.stdout.write(`${jsonLine({ type: "sample", model, ...sample })}\n`);
			process.stdout.write(`${jsonLine(lineOf(last))}\n`);
		}
		if (!flags.json) process.stdout.write(table(results));
		return 0;
	}).finally(() => live?.clear());
}

function lineOf({ model, source, rows, figures, seconds, highestLosses }: ModelEvaluation) {
	return {
		type: "evaluation",
		model,
		source,
		rows,
		...figures,
		eval_runtime: seconds,
		eval_samples_per_second: rows / Math.max(seconds, 1e-9),
		highest_losses: highestLosses,
	};
}

/** A line for each model, and below it one for each source. */
function table(results: readonly ModelEvaluation[]): string {
	const { bold, dim } = pc.createColors(wantsColor(process.stdout));
	const [first] = results;
	if (!first) return "";
	const lines = [`${first.rows} rows of ${first.source}`, ""];
	const more = moreFigures(first);
	const rows: string[][] = [["", "loss", "perplexity", "accuracy", "entropy", ...more, ""]];
	for (const { model, figures, seconds, rows: many } of results) {
		const names = Object.keys(figures).flatMap((name) => /^eval_(.*)loss$/.exec(name)?.[1] ?? []);
		for (const source of names) {
			const speed = source === "" ? `${count(many / Math.max(seconds, 1e-9))} rows/s, ${duration(seconds)}` : "";
			rows.push([source === "" ? model : `  ${source.slice(0, -1)}`, ...cells(figures, source, more), speed]);
		}
	}
	const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? [];
	for (const [i, row] of rows.entries()) {
		const text = row.map((cell, column) => {
			const padded = column === 0 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0);
			return column === row.length - 1 ? dim(cell) : padded;
		});
		lines.push(i === 0 ? bold(text.join("  ").trimEnd()) : text.join("  ").trimEnd());
	}
	return `${lines.join("\n")}\n`;
}

/** The figures of generated replies. */
function moreFigures({ figures }: ModelEvaluation): string[] {
	const names = Object.keys(figures).map((name) => name.slice("eval_".length));
	const known = new Set<string>(FIGURES);
	const sources = names.flatMap((name) => /^(.+_)loss$/.exec(name)?.[1] ?? []);
	return names.filter((name) => !known.has(name) && !sources.some((source) => name.startsWith(source)));
}

function cells(figures: ModelEvaluation["figures"], source: string, more: readonly string[]): string[] {
	return [...FIGURES, ...more].map((figure) => {
		const value = figures[`eval_${source}${figure}`];
		if (value === undefined) return "";
		return figure === "mean_token_accuracy" || figure === "exact_match" ? percent(value) : measure(value);
	});
}
