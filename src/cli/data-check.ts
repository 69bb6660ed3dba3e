/** `arl data check`: reads every row of every source as a run would, and reports what is wrong with it. */

import type { DataReport } from "../api/check-rows.js";
import type { ImageReport } from "../api/image-counts.js";
import type { LengthSummary } from "../api/length-summary.js";
import { noteLine } from "../data/tokens/notes.js";
import { EXIT_CODES } from "../errors.js";
import { loadNative, type Native } from "../native.js";
import { count, jsonLine, percent } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { JSON_FLAG } from "./command.js";
import { fetchingOn } from "./fetching.js";
import { resolveCommand, withOptions } from "./resolve.js";
import { stoppable } from "./signals.js";

export const COMMAND = withOptions({
	name: "arl data check",
	usage: "[CONFIG] [--OPTION VALUE ...]",
	about: `Reads every row of every source as \`arl train\` would, and trains nothing:
  arl data check --model_name_or_path DIR --train_file rows.jsonl

Takes the options of \`arl train\` (\`arl train --help\`); those on rows and text count. It needs no output_dir, and
writes nothing. Reports each bad row with its place and reason, lengths, duplicates, rows that are too long, images and
their tokens, and the part of the rows that an epoch trains. Every image that the model sees is decoded.

Exit code 3 where a row cannot be used, else 0.`,
	flags: { json: JSON_FLAG },
});

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const found = await resolveCommand(COMMAND, words, { output_dir: "." });
	if (found === null) return 0;
	const { resolved, flags } = found;
	for (const notice of resolved.notices) process.stderr.write(`${notice}\n`);
	const live = liveLine(process.stderr);
	return stoppable(async (signal) => {
		const { checkRows } = await import("../api/check-rows.js");
		const report = await checkRows({
			native: core(),
			args: resolved.args,
			code: { dataset: null, convert: null },
			signal,
			fetching: fetchingOn(live),
			progress: (rows, of) => live?.show([{ text: `${rows}/${of} rows checked`, keep: 0 }]),
		});
		live?.clear();
		process.stdout.write(flags.json ? `${jsonLine(report)}\n` : formatReport(report));
		return report.bad.length > 0 ? EXIT_CODES.ARL_DATA : 0;
	}).finally(() => live?.clear());
}

const SHOWN = 20;
const BAR = 40;

/** The report as a person reads it. */
function formatReport(report: DataReport): string {
	const { rows, usable, bad, tokens, targetTokens } = report;
	const lines = [`${rows} rows of ${report.shape}, ${usable} can be trained${asides(report)}`];
	lines.push(...report.notices);
	lines.push(...report.notes.map(noteLine));
	if (report.entries.length > 1) lines.push(...entries(report));
	if (bad.length > 0) {
		const reasons = Object.entries(report.reasons).map(([reason, many]) => `${many} ${reason}`);
		lines.push("", `bad rows: ${bad.length} (${reasons.join(", ")})`);
		// The core's messages often begin with the reason.
		for (const { location, reason, message } of bad) {
			lines.push(`  ${location}: ${message.startsWith(reason) ? message : `${reason}: ${message}`}`);
		}
	}
	if (report.overLong.length > 0) {
		lines.push("", `longer than ${report.maxLength} tokens: ${report.overLong.length}`);
		lines.push(...shown(report.overLong.map(({ location, tokens: many }) => `${location}: ${many} tokens`)));
	}
	if (report.duplicateRows > 0) {
		lines.push("", `duplicates of earlier rows: ${report.duplicateRows}`);
		const groups = report.duplicates.map(({ locations, rows: many }) => {
			const more = many > locations.length ? `, and ${many - locations.length} more` : "";
			return `${locations.join(" = ")}${more}`;
		});
		lines.push(...shown(groups));
	}
	if (usable > 0) {
		lines.push("", ...lengths("tokens", tokens), "", ...lengths("trained tokens", targetTokens));
		if (report.images !== null && report.images.images > 0) lines.push("", ...images(report.images));
		const ofRows = `${report.trainedRows} of ${rows} rows (${percent(report.trainedRows / rows)})`;
		const ofTokens = `${count(targetTokens.sum)} of ${count(tokens.sum)} tokens of usable rows (${percent(targetTokens.sum / tokens.sum)})`;
		lines.push("", `trained: ${ofRows}, ${ofTokens}`);
	}
	return `${lines.join("\n")}\n`;
}

function asides({ blankLines, leftOut, truncated, dropped }: DataReport): string {
	const parts = [
		blankLines > 0 ? `${blankLines} blank lines skipped` : "",
		leftOut > 0 ? `${leftOut} left out by the converting function` : "",
		truncated > 0 ? `${truncated} cut to max_length` : "",
		dropped > 0 ? `${dropped} dropped as too long` : "",
	].filter((part) => part !== "");
	return parts.map((part) => `; ${part}`).join("");
}

function entries(report: DataReport): string[] {
	const width = Math.max(...report.entries.map(({ name }) => name.length));
	return report.entries.map(({ name, rows, usable, rowsPerEpoch }) => {
		return `  ${name.padEnd(width)}  ${rows} rows, ${usable} usable, ${rowsPerEpoch} in an epoch`;
	});
}

function shown(lines: readonly string[]): string[] {
	const more = lines.length > SHOWN ? [`  and ${lines.length - SHOWN} more; --json names every one`] : [];
	return [...lines.slice(0, SHOWN).map((line) => `  ${line}`), ...more];
}

function images({ images: many, rows, tokens, pixels, downscaled, upscaled }: ImageReport): string[] {
	const side = (area: number) => Math.round(Math.sqrt(area));
	const size = (area: number) => `${side(area)}²`;
	return [
		`images: ${many} in ${rows} rows; ${downscaled} scaled down, ${upscaled} scaled up`,
		`  pixels: min ${size(pixels.min)}, median ${size(pixels.median)}, max ${size(pixels.max)}`,
		`  tokens of an image: min ${tokens.min}, median ${tokens.median}, max ${tokens.max}, ${count(tokens.sum)} in total`,
	];
}

function lengths(name: string, summary: LengthSummary): string[] {
	const { sum, min, median, p95, max, histogram } = summary;
	const most = Math.max(...histogram.map(({ rows }) => rows));
	const width = Math.max(...histogram.map(({ from, to }) => `${from}-${to - 1}`.length));
	const bars = histogram.map(({ from, to, rows }) => {
		const bar = "█".repeat(Math.ceil((BAR * rows) / most));
		return `  ${`${from}-${to - 1}`.padStart(width)}  ${bar}${bar === "" ? "" : " "}${rows}`;
	});
	return [`${name}: min ${min}, median ${median}, p95 ${p95}, max ${max}, ${count(sum)} in total`, ...bars];
}
