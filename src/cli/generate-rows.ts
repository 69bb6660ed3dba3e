/** The rows of `arl generate`: their trained replies by one model or two, and how many equal the expected ones. */
import pc from "picocolors";
import { openFiles } from "../data/sources/open.js";
import { chooseDevice } from "../device/index.js";
import { ArlError } from "../errors.js";
import { modelFolder, rowFiles } from "../hub/index.js";
import type { Native } from "../native.js";
import { droppedImages } from "../report/format.js";
import { count, duration, jsonLine, percent } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { escapeControls, wantsColor } from "../report/terminal.js";
import type { Prompt } from "../run/eval/prompts.js";
import { type Completion, ReplyGenerator, type ReplyOptions } from "../run/eval/replies.js";
import { fetchingOn } from "./fetching.js";

/** What the command's flags say, as far as rows are concerned. */
export interface RowFlags extends Omit<ReplyOptions, "device" | "batchSize" | "maxNewTokens" | "topK" | "topP"> {
	model_name_or_path: string;
	compare: string | null;
	prompt_file: string[];
	limit: number | null;
	examples: number;
	max_new_tokens: number | null;
	per_device_eval_batch_size: number;
	top_k: number;
	top_p: number;
	load_in_4bit: boolean;
	use_bnb_nested_quant: boolean;
	device: string;
	json: boolean;
}

/** How well a model replied. */
interface Score {
	model: string;
	rows: number;
	exactRows: number;
	replies: number;
	exactReplies: number;
	tokens: number;
	seconds: number;
}

function score(model: string, prompts: readonly Prompt[], completions: readonly Completion[], seconds: number): Score {
	const rows = new Map<number, boolean>();
	for (const [i, prompt] of prompts.entries()) {
		rows.set(prompt.row, (rows.get(prompt.row) ?? true) && completions[i]?.exact === true);
	}
	return {
		model,
		rows: rows.size,
		exactRows: [...rows.values()].filter((exact) => exact).length,
		replies: prompts.length,
		exactReplies: completions.filter(({ exact }) => exact).length,
		tokens: completions.reduce((sum, { tokens }) => sum + tokens, 0),
		seconds,
	};
}

/** Generates the replies, and prints them with each model's score; gives the exit code. */
export async function generateRows(native: Native, flags: RowFlags, signal: AbortSignal): Promise<number> {
	const device = chooseDevice(flags.device, native);
	if (device.notice !== null) process.stderr.write(`${device.notice}\n`);
	const options: ReplyOptions = {
		...flags,
		device,
		batchSize: flags.per_device_eval_batch_size,
		maxNewTokens: flags.max_new_tokens,
		topK: flags.top_k,
		topP: flags.top_p,
		loadIn4bit: flags.load_in_4bit,
		nestedQuant: flags.use_bnb_nested_quant,
	};
	const live = liveLine(process.stderr);
	const calls = { signal, progress: fetchingOn(live) };
	const files = await rowFiles(flags.prompt_file, calls).finally(() => live?.clear());
	const { source, notices } = await openFiles(native, files.entries, { columns: flags.columns });
	const generators: ReplyGenerator[] = [];
	try {
		for (const notice of [...files.notices, ...notices]) process.stderr.write(`${notice}\n`);
		if (source.length === 0) throw new ArlError("ARL_DATA", `${source.name}: no rows`);
		const models = [flags.model_name_or_path, ...(flags.compare === null ? [] : [flags.compare])];
		const results: { prompts: Prompt[]; generator: ReplyGenerator; completions: Completion[]; score: Score }[] = [];
		for (const model of models) {
			// The adapter is the first model's.
			const adapter = model === flags.model_name_or_path && results.length === 0 ? options.adapter : null;
			const found = await modelFolder(model, { weights: true, ...calls }).finally(() => live?.clear());
			if (found.notice !== null) process.stderr.write(`${found.notice}\n`);
			const opening = { ...options, adapter: adapter ?? null };
			const generator = await ReplyGenerator.open(native, found.path, opening, source, signal);
			generators.push(generator);
			const prompts = await generator.prompts(flags.limit ?? Number.MAX_SAFE_INTEGER);
			const started = performance.now();
			const completions = await generateWithProgress(model, generator, prompts, signal);
			results.push({
				prompts,
				generator,
				completions,
				score: score(model, prompts, completions, (performance.now() - started) / 1000),
			});
		}
		const dropped = results[0] ? droppedImages(results[0].generator.dropped) : "";
		if (dropped !== "") process.stderr.write(`${dropped}\n`);
		if (flags.json) printJson(results);
		else printText(results, flags.examples);
		return 0;
	} finally {
		for (const generator of generators) await generator.close();
		await source.close();
	}
}

async function generateWithProgress(
	model: string,
	generator: ReplyGenerator,
	prompts: Prompt[],
	signal: AbortSignal,
): Promise<Completion[]> {
	const live = liveLine(process.stderr);
	const show = (done: number) =>
		live?.show([{ text: `${model}: ${done}/${prompts.length} replies generated`, keep: 0 }]);
	show(0);
	try {
		return await generator.generate(prompts, show, signal);
	} finally {
		live?.clear();
	}
}

type Result = { prompts: Prompt[]; generator: ReplyGenerator; completions: Completion[]; score: Score };

function printJson(results: readonly Result[]): void {
	for (const { prompts, generator, completions, score: reached } of results) {
		for (const [i, prompt] of prompts.entries()) {
			const { text, exact, tokens } = completions[i] ?? { text: "", exact: false, tokens: 0 };
			const { location, message } = prompt;
			const line = {
				type: "answer",
				model: reached.model,
				location,
				message,
				expected: generator.expectedText(prompt),
				answer: text,
				exact,
				tokens,
			};
			process.stdout.write(`${jsonLine(line)}\n`);
		}
	}
	for (const { score: reached } of results) process.stdout.write(`${jsonLine({ type: "score", ...reached })}\n`);
}

function printText(results: readonly Result[], examples: number): void {
	const colors = pc.createColors(wantsColor(process.stdout));
	const write = (line: string) => process.stdout.write(`${line}\n`);
	const [first] = results;
	for (const at of first ? spread(first.prompts.length, examples) : []) {
		const prompt = first?.prompts[at];
		if (!first || !prompt) continue;
		write(colors.bold(`${prompt.location}, message ${prompt.message}`));
		if (prompt.lastMessage !== "") write(`  ${colors.dim("given   ")} ${oneLine(prompt.lastMessage)}`);
		write(`  ${colors.dim("expected")} ${oneLine(first.generator.expectedText(prompt))}`);
		for (const { completions, score: reached } of results) {
			const answer = completions[at];
			const mark = answer?.exact ? colors.green("exact   ") : colors.red("differs ");
			write(`  ${mark} ${oneLine(answer?.text ?? "")}  ${colors.dim(`(${reached.model})`)}`);
		}
		write("");
	}
	const width = Math.max(...results.map(({ score: reached }) => reached.model.length));
	write(colors.bold("answered exactly right"));
	for (const { score: reached } of results) {
		const rows = `${percent(reached.exactRows / reached.rows)} of rows (${reached.exactRows} of ${reached.rows})`;
		const replies = `${percent(reached.exactReplies / reached.replies)} of replies (${reached.exactReplies} of ${reached.replies})`;
		const speed = `${count(reached.tokens / reached.seconds)} tokens/s, ${duration(reached.seconds)}`;
		write(`  ${reached.model.padEnd(width)}  ${rows}, ${replies}  ${colors.dim(speed)}`);
	}
}

/** `wanted` indexes spread evenly over `length`. */
function spread(length: number, wanted: number): number[] {
	const many = Math.min(length, wanted);
	return Array.from({ length: many }, (_, i) => Math.floor(((i + 0.5) * length) / many));
}

function oneLine(text: string): string {
	const flat = escapeControls(text).replaceAll("\n", "\\n");
	return flat.length > 160 ? `${flat.slice(0, 157)}...` : flat;
}
