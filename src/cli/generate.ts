/** `arl generate`: answers the trained replies of held-out rows with one model or two, and counts the exact ones. */
import pc from "picocolors";
import {
	described,
	flag,
	integer,
	integerOrNone,
	number,
	required,
	stringOrNone,
	strings,
	trainingSchema,
	type Values,
} from "../config/index.js";
import { openFiles } from "../data/sources/open.js";
import { chooseDevice } from "../device/index.js";
import { ArlError } from "../errors.js";
import { loadNative, type Native } from "../native.js";
import { droppedImages } from "../report/format.js";
import { count, duration, jsonLine, percent } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { wantsColor } from "../report/terminal.js";
import { type Answer, Answerer, type AskOptions, type Question } from "../run/eval/generate.js";
import { parseCommand } from "./command.js";
import { stoppable } from "./signals.js";

const { model_name_or_path, seed, threads, device, bf16, chat_template, thinking, columns, images } =
	trainingSchema.shape;

const COMMAND = {
	name: "arl generate",
	usage: "--model_name_or_path DIR --prompt_file FILE... [--OPTION VALUE ...]",
	about: "Answers the trained replies of rows by generation and counts the exact ones.",
	flags: {
		model_name_or_path,
		compare: stringOrNone({ expects: "a folder", description: "A second model, shown side by side with the first." }),
		prompt_file: required(
			strings({ expects: "files, folders or globs", description: "" }),
			"Rows whose replies are to be answered, in any shape that `arl train` takes.",
		),
		limit: integerOrNone({ min: 1, description: "Answer the first rows only; none: all." }),
		examples: integer({ min: 0, default: 3, description: "Answers that are shown in full." }),
		max_new_tokens: integerOrNone({
			min: 1,
			description: "Longest answer in tokens; none: the longest expected one, and 8 more.",
		}),
		per_device_eval_batch_size: integer({
			min: 1,
			max: 4096,
			default: 32,
			description: "Answers that are generated at once.",
		}),
		temperature: number({
			min: 0,
			default: 0,
			description: "0 takes the most probable token; above 0 draws with `seed`.",
		}),
		seed: described(seed, "Seed of the draws."),
		threads,
		device,
		bf16: described(bf16, "Compute in bfloat16; auto: on a GPU."),
		chat_template,
		thinking,
		columns,
		images,
		json: flag("Print one JSON value a line: each answer, then the summary of each model."),
	},
};

type Options = Values<typeof COMMAND.flags>;

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

function score(model: string, questions: readonly Question[], answers: readonly Answer[], seconds: number): Score {
	const rows = new Map<number, boolean>();
	for (const [i, question] of questions.entries()) {
		rows.set(question.row, (rows.get(question.row) ?? true) && answers[i]?.exact === true);
	}
	return {
		model,
		rows: rows.size,
		exactRows: [...rows.values()].filter((exact) => exact).length,
		replies: questions.length,
		exactReplies: answers.filter(({ exact }) => exact).length,
		tokens: answers.reduce((sum, { tokens }) => sum + tokens, 0),
		seconds,
	};
}

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	return stoppable((signal) => generate(core(), given.flags, signal));
}

async function generate(native: Native, options: Options, signal: AbortSignal): Promise<number> {
	const { columns, images, chat_template, thinking, threads, seed, bf16 } = options;
	const device = chooseDevice(options.device, native);
	if (device.notice !== null) process.stderr.write(`${device.notice}\n`);
	const ask: AskOptions = {
		columns,
		images,
		chat_template,
		thinking,
		threads,
		seed,
		bf16,
		batchSize: options.per_device_eval_batch_size,
		maxNewTokens: options.max_new_tokens,
		temperature: options.temperature,
		device,
	};
	const { source, notices } = await openFiles(native, options.prompt_file, { columns: ask.columns });
	try {
		for (const notice of notices) process.stderr.write(`${notice}\n`);
		const sample = await source.read(Array.from({ length: Math.min(64, source.length) }, (_, i) => i));
		if (sample.length === 0) throw new ArlError("ARL_DATA", `${source.name}: no rows`);
		const models = [options.model_name_or_path, ...(options.compare === null ? [] : [options.compare])];
		const results: { questions: Question[]; answerer: Answerer; answers: Answer[]; score: Score }[] = [];
		for (const model of models) {
			const answerer = new Answerer(native, model, ask, sample);
			const questions = await answerer.questions(source, options.limit ?? Number.MAX_SAFE_INTEGER);
			const started = performance.now();
			const answers = await answerWithProgress(model, answerer, questions, signal);
			results.push({
				questions,
				answerer,
				answers,
				score: score(model, questions, answers, (performance.now() - started) / 1000),
			});
		}
		const dropped = results[0] ? droppedImages(results[0].answerer.dropped) : "";
		if (dropped !== "") process.stderr.write(`${dropped}\n`);
		if (options.json) printJson(results);
		else printText(results, options.examples);
		return 0;
	} finally {
		await source.close();
	}
}

async function answerWithProgress(
	model: string,
	answerer: Answerer,
	questions: Question[],
	signal: AbortSignal,
): Promise<Answer[]> {
	const live = liveLine(process.stderr);
	const show = (done: number) =>
		live?.show([{ text: `${model}: ${done}/${questions.length} replies answered`, keep: 0 }]);
	show(0);
	try {
		return await answerer.answer(questions, show, signal);
	} finally {
		live?.clear();
	}
}

type Result = { questions: Question[]; answerer: Answerer; answers: Answer[]; score: Score };

function printJson(results: readonly Result[]): void {
	for (const { questions, answerer, answers, score: reached } of results) {
		for (const [i, question] of questions.entries()) {
			const { text, exact, tokens } = answers[i] ?? { text: "", exact: false, tokens: 0 };
			const { location, message } = question;
			const line = {
				type: "answer",
				model: reached.model,
				location,
				message,
				expected: answerer.expectedText(question),
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
	for (const at of first ? spread(first.questions.length, examples) : []) {
		const question = first?.questions[at];
		if (!first || !question) continue;
		write(colors.bold(`${question.location}, message ${question.message}`));
		if (question.asked !== "") write(`  ${colors.dim("given   ")} ${oneLine(question.asked)}`);
		write(`  ${colors.dim("expected")} ${oneLine(first.answerer.expectedText(question))}`);
		for (const { answers, score: reached } of results) {
			const answer = answers[at];
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
