/** `arl inspect`: one row as the model will see it. */
import { writeFile } from "node:fs/promises";
import pc from "picocolors";
import type { InspectedImage, InspectedRow, TokenText } from "../api/inspect-row.js";
import { flag, integer, stringOrNone } from "../config/index.js";
import { noteLine } from "../data/tokens/notes.js";
import { writeWhole } from "../disk/write-whole.js";
import { encodePng } from "../images/png.js";
import { loadNative, type Native } from "../native.js";
import { jsonLine, percent } from "../report/index.js";
import { inlineImage, inlineProtocol } from "../report/inline-image.js";
import { liveLine } from "../report/live.js";
import { escapeControls, wantsColor } from "../report/terminal.js";
import { JSON_FLAG } from "./command.js";
import { fetchingOn } from "./fetching.js";
import { inspectHtml, type ShownImage } from "./inspect-html.js";
import { resolveCommand, withOptions } from "./resolve.js";
import { stoppable } from "./signals.js";

export const COMMAND = withOptions({
	name: "arl inspect",
	usage: "[CONFIG] [--row N] [--OPTION VALUE ...]",
	about: `Shows one row as the model sees it, with the trained tokens in colour:
  arl inspect --model_name_or_path DIR --train_file rows.jsonl --row 17

Takes the options of \`arl train\` (\`arl train --help\`); those on rows and text count. It needs no output_dir, and
writes nothing but the page of --html. An image that the model sees is shown by the grid of its tokens, and in a terminal of kitty
or iTerm2 as the model gets it. Without colours, « and » enclose the trained tokens.`,
	flags: {
		row: integer({ min: 1, default: 1, description: "The row, counted over all sources." }),
		html: stringOrNone({
			expects: "a file",
			description: "Write a page with the row to this file; images are in it as the model gets them.",
		}),
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
		const protocol = process.stdout.isTTY && !flags.json ? inlineProtocol(process.env) : null;
		const shown: ShownImage[] = [];
		const pixels = (image: InspectedImage, bytes: Uint8Array) => {
			shown.push({ image, png: encodePng(bytes, image.resized.height, image.resized.width) });
		};
		const wanted = flags.html === null && protocol === null ? {} : { pixels };
		const asked = { native: core(), args: resolved.args, code, row: flags.row - 1, signal, fetching, ...wanted };
		const row = await inspectRow(asked).finally(() => live?.clear());
		for (const line of [...row.notices, ...row.notes.map(noteLine)]) process.stderr.write(`${line}\n`);
		if (flags.html !== null) {
			const page = inspectHtml(row, shown);
			await writeWhole(flags.html, (partial) => writeFile(partial, page));
			process.stderr.write(`wrote ${flags.html}\n`);
		}
		const color = wantsColor(process.stdout);
		if (flags.json) process.stdout.write(`${jsonLine(row)}\n`);
		else process.stdout.write(`${summary(row)}\n${flags.tokens ? tokenLines(row, color) : text(row, color)}`);
		if (protocol !== null) for (const { png } of shown) process.stdout.write(inlineImage(png, protocol));
		return 0;
	});
}

function summary({ location, shape, recordId, tokens, targetTokens, spans, images }: InspectedRow): string {
	const name = recordId === null ? "" : `, record_id ${JSON.stringify(recordId)}`;
	const lines = [
		`${location}: ${tokens} tokens of ${shape}, ${targetTokens} trained (${percent(targetTokens / tokens)})${name}`,
	];
	for (const { message, first, last, weight } of spans) {
		const weighted = weight === 1 ? "" : `, weight ${weight}`;
		lines.push(`  message ${message}: tokens ${first} to ${last} (${last - first + 1})${weighted}`);
	}
	for (const image of images) {
		const { name, at, tokens: many, columns, rows, original, resized } = image;
		const size = `${original.width} x ${original.height} pixels, ${resized.width} x ${resized.height} for the model`;
		lines.push(`  ${name}: tokens ${at} to ${at + many - 1} (${columns} x ${rows} = ${many}), ${size}`);
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

function tokenLines({ texts, images }: InspectedRow, color: boolean): string {
	const colors = pc.createColors(color);
	const starts = new Set(images.map(({ at }) => at));
	const lines = texts.map((token) => {
		const trained = isTrained(token);
		// An image's tokens are all the same.
		const isImage = starts.has(token.at);
		const weights = isImage ? token.weights.slice(0, 1).join("") : token.weights.join(" ");
		const ids = isImage ? `${token.ids[0]} x ${token.ids.length}` : token.ids.join(" ");
		const line = `${String(token.at).padStart(6)}  ${ids.padStart(7)}  ${(trained ? weights : "-").padStart(4)}  ${JSON.stringify(token.text)}`;
		return trained ? colors.green(line) : line;
	});
	return `${lines.join("\n")}\n`;
}
