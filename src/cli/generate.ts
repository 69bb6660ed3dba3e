/** `arl generate`: generates the trained replies of held-out rows with one model or two, and counts the exact ones. */
import { Option } from "commander";
import pc from "picocolors";
import { openFiles } from "../data/sources/open.js";
import { chooseDevice } from "../device/index.js";
import { ArlError, EXIT_CODES, toArlError } from "../errors.js";
import { loadNative, type Native } from "../native.js";
import { droppedImages } from "../report/format.js";
import { count, duration, jsonLine, percent } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { wantsColor } from "../report/terminal.js";
import { type Completion, type Prompt, ReplyGenerator, type ReplyOptions } from "../run/eval/replies.js";
import { columns, command, deviceName, numberFrom, parse, wholeNumber } from "./options.js";
import { onStopSignals } from "./signals.js";

interface Options {
	model_name_or_path: string;
	compare?: string;
	prompt_file: string[];
	limit: number;
	examples: number;
	max_new_tokens?: number;
	per_device_eval_batch_size: number;
	temperature: number;
	seed: number;
	threads?: number;
	device: string;
	bf16: "true" | "false" | "auto";
	chat_template?: string;
	thinking?: "keep" | "strip" | "last";
	columns?: string[];
	images: "error" | "drop";
	json?: boolean;
}

function definition() {
	return command("generate", "Answers the trained replies of rows by generation and counts the exact ones.")
		.requiredOption("--model_name_or_path <folder>", "the model")
		.option("--compare <folder>", "a second model, shown side by side with the first")
		.requiredOption(
			"--prompt_file <file...>",
			"rows with the replies to be answered, in any shape that `arl train` takes",
		)
		.option("--limit <n>", "rows that are answered; the first of the files", wholeNumber(1), Number.MAX_SAFE_INTEGER)
		.option("--examples <n>", "replies that are shown in full", wholeNumber(0), 3)
		.option(
			"--max_new_tokens <n>",
			"longest answer in tokens (default: the longest expected one, and 8 more)",
			wholeNumber(1),
		)
		.option("--per_device_eval_batch_size <n>", "replies that are generated at a time", wholeNumber(1, 4096), 32)
		.option("--temperature <x>", "0 takes the most probable token; above 0 draws with --seed", numberFrom(0), 0)
		.option("--seed <n>", "seed of the draws", wholeNumber(0, 4_294_967_295), 42)
		.option("--threads <n>", "threads that compute (default: as many as the process may use)", wholeNumber(1, 1024))
		.option("--device <name>", "auto, cpu, cuda or cuda:N, as for `arl train`", deviceName, "auto")
		.addOption(
			new Option("--bf16 [how]", "compute in bfloat16; auto: on a GPU")
				.choices(["true", "false", "auto"])
				.preset("true")
				.default("auto"),
		)
		.option("--chat_template <file>", "a Jinja chat template that replaces the checkpoint's")
		.addOption(
			new Option("--thinking <how>", "what happens to reasoning in earlier replies").choices(["keep", "strip", "last"]),
		)
		.option("--columns <name=column...>", "names of columns that differ from the known ones")
		.addOption(
			new Option("--images <how>", "what image parts of rows do: end the command, or be left out and counted")
				.choices(["error", "drop"])
				.default("error"),
		)
		.option("--json", "one JSON value a line: each answer, then the summary of each model");
}

/** How well a model answered. */
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

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const options = parse<Options>(definition(), words);
	if (options === null) return 0;
	const stop = onStopSignals(() => process.stderr.write("stopping\n"));
	try {
		return await generate(core(), options, stop.signal);
	} catch (error) {
		if (stop.signal.aborted) return EXIT_CODES.ARL_INTERRUPTED;
		throw toArlError(error);
	} finally {
		stop.release();
	}
}

async function generate(native: Native, options: Options, signal: AbortSignal): Promise<number> {
	const device = chooseDevice(options.device, native);
	if (device.notice !== null) process.stderr.write(`${device.notice}\n`);
	const ask: ReplyOptions = {
		columns: columns(options.columns),
		images: options.images,
		chat_template: options.chat_template ?? null,
		thinking: options.thinking ?? null,
		threads: options.threads ?? null,
		seed: options.seed,
		batchSize: options.per_device_eval_batch_size,
		maxNewTokens: options.max_new_tokens ?? null,
		temperature: options.temperature,
		bf16: options.bf16 === "auto" ? "auto" : options.bf16 === "true",
		device,
	};
	const { source, notices } = await openFiles(native, options.prompt_file, { columns: ask.columns });
	try {
		for (const notice of notices) process.stderr.write(`${notice}\n`);
		const sample = await source.read(Array.from({ length: Math.min(64, source.length) }, (_, i) => i));
		if (sample.length === 0) throw new ArlError("ARL_DATA", `${source.name}: no rows`);
		const models = [options.model_name_or_path, ...(options.compare === undefined ? [] : [options.compare])];
		const results: { prompts: Prompt[]; generator: ReplyGenerator; completions: Completion[]; score: Score }[] = [];
		for (const model of models) {
			const generator = new ReplyGenerator(native, model, ask, sample);
			const prompts = await generator.prompts(source, options.limit);
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
		if (options.json) printJson(results);
		else printText(results, options.examples);
		return 0;
	} finally {
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
	const flat = text.replaceAll("\n", "\\n");
	return flat.length > 160 ? `${flat.slice(0, 157)}...` : flat;
}
