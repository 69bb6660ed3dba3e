/** `arl inspect`: one row as the model will see it. */
import pc from "picocolors";
import type { InspectedRow, TokenText } from "../api/inspect-row.js";
import { flag, integer } from "../config/index.js";
import { noteLine } from "../data/tokens/notes.js";
import { loadNative, type Native } from "../native.js";
import { jsonLine, percent } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { escapeControls, wantsColor } from "../report/terminal.js";
import { JSON_FLAG } from "./command.js";
import { fetchingOn } from "./fetching.js";
import { resolveCommand, withOptions } from "./resolve.js";
import { stoppable } from "./signals.js";

export const COMMAND = withOptions({
	name: "arl inspect",
	usage: "[CONFIG] [--row N] [--OPTION VALUE ...]",
	about: `Shows one row as the model sees it, with the trained tokens in colour:
  arl inspect --model_name_or_path DIR --train_file rows.jsonl --row 17

Takes the options of \`arl train\` (\`arl train --help\`); those on rows and text count. It needs no output_dir, and
writes nothing. Without colours, « and » enclose the trained tokens.`,
	flags: {
		row: integer({ min: 1, default: 1, description: "The row, counted over all sources." }),
		tokens: flag("Print a line for each token: its number, id, weight and text."),
		json: JSON_FLAG,
	},
});

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const found = await resolveCommand(COMMAND, words, { output_dir: "." });
	if (found === null) return 0;
	const { resolved, flags } = found;
	for (const notice of resolved.notices) process.stderr.write(`${notice}\n`);
	return stoppable(async (signal) => {
		const { inspectRow } = await import("../api/inspect-row.js");
		const code = { dataset: null, convert: null };
		const live = liveLine(process.stderr);
		const fetching = fetchingOn(live);
		const asked = { native: core(), args: resolved.args, code, row: flags.row - 1, signal, fetching };
		const row = await inspectRow(asked).finally(() => live?.clear());
		for (const line of [...row.notices, ...row.notes.map(noteLine)]) process.stderr.write(`${line}\n`);
		const color = wantsColor(process.stdout);
		if (flags.json) process.stdout.write(`${jsonLine(row)}\n`);
		else process.stdout.write(`${summary(row)}\n${flags.tokens ? tokenLines(row, color) : text(row, color)}`);
		return 0;
	});
}

function summary({ location, shape, recordId, tokens, targetTokens, spans }: InspectedRow): string {
	const name = recordId === null ? "" : `, record_id ${JSON.stringify(recordId)}`;
	const lines = [
		`${location}: ${tokens} tokens of ${shape}, ${targetTokens} trained (${percent(targetTokens / tokens)})${name}`,
	];
	for (const { message, first, last, weight } of spans) {
		const weighted = weight === 1 ? "" : `, weight ${weight}`;
		lines.push(`  message ${message}: tokens ${first} to ${last} (${last - first + 1})${weighted}`);
	}
	return lines.join("\n");
}

const isTrained = ({ weights }: TokenText) => weights.some((weight) => weight > 0);

/** The whole text: neighbouring tokens differ in shade, trained ones are green. */
function text({ texts }: InspectedRow, color: boolean): string {
	const colors = pc.createColors(color);
	let out = "";
	let open = false;
	for (const [i, token] of texts.entries()) {
		const trained = isTrained(token);
		if (!color && trained !== open) out += trained ? "«" : "»";
		open = trained;
		const shade = trained ? (i % 2 === 0 ? colors.green : colors.greenBright) : i % 2 === 0 ? colors.dim : String;
		// A colour that continues past the end of a line would colour a pager's own text.
		const lines = escapeControls(token.text).split("\n");
		out += lines.map((line) => (line === "" ? "" : shade(line))).join("\n");
	}
	if (!color && open) out += "»";
	return out.endsWith("\n") ? out : `${out}\n`;
}

function tokenLines({ texts }: InspectedRow, color: boolean): string {
	const colors = pc.createColors(color);
	const lines = texts.map((token) => {
		const trained = isTrained(token);
		const weights = token.weights.join(" ");
		const line = `${String(token.at).padStart(6)}  ${token.ids.join(" ").padStart(7)}  ${(trained ? weights : "-").padStart(4)}  ${JSON.stringify(token.text)}`;
		return trained ? colors.green(line) : line;
	});
	return `${lines.join("\n")}\n`;
}
