/** What a person wants to know of a run, in a sentence each: what it reached, its memory, its waiting, how to use the result. */
import { basename, join } from "node:path";
import { bytesToTenth, duration, measure, percent } from "../format.js";
import { type Course, type Figures, lowerIsBetter } from "./figures.js";
import { MERGED_FOLDER, REPORT_FILE, type RunRecord } from "./record.js";

/** A sentence with the word that it is found by. */
export interface Sentence {
	label: string;
	text: string;
}

/** Waiting beyond this share of the time is worth advice. */
const MUCH_WAITING = 0.1;

/** Where the model of the run in `folder` is: all of it, else its latest checkpoint; null: none is saved. */
export function resultFolder({ end, saves }: RunRecord, folder: string): string | null {
	// The record's own paths are those at the time; the folder may have moved since.
	const path = end?.modelPath ?? saves.at(-1)?.path ?? null;
	if (path === null) return null;
	return /^checkpoint-\d+$/.test(basename(path)) ? join(folder, basename(path)) : folder;
}

/** The sentences of the run in `folder`, as far as they are known. */
export function sentencesOf(record: RunRecord, figures: Figures | null, folder: string): Sentence[] {
	const model = resultFolder(record, folder);
	return [
		...(figures === null ? [] : [...reached(record, figures), memory(record, figures), waiting(figures)]),
		...(model === null ? [] : [{ label: "use it", text: useCommand(record, model) }]),
	];
}

/** The sentences of an ended run as lines of text, and where its report is. */
export function closingLines(record: RunRecord, folder: string): string[] {
	const report = { label: "report", text: join(folder, REPORT_FILE) };
	const sentences = [...sentencesOf(record, record.figures, folder), report];
	return sentences.map(({ label, text }) => `${label.padEnd(8)} ${text}`);
}

/** The model whose adapter the run trained; null: it trained the model itself. */
export function baseOf({ options }: RunRecord): string | null {
	const value = (name: string) => options.find((option) => option.name === name)?.value ?? null;
	const trainsAdapter = value("use_peft") === true || value("adapter_name_or_path") !== null;
	return trainsAdapter ? String(value("model_name_or_path")) : null;
}

/** The folder of the model with its adapter merged into it, in the run's result `model`; null: the run wrote none. */
export function mergedFolder({ options, end }: RunRecord, model: string): string | null {
	const merges = options.some(({ name, value }) => name === "merge_adapter" && value === true);
	return merges && end?.outcome === "completed" ? join(model, MERGED_FOLDER) : null;
}

/** The command that talks to the run's result: to the merged model where there is one. */
function useCommand(record: RunRecord, model: string): string {
	const merged = mergedFolder(record, model);
	return merged === null ? chatCommand(model, baseOf(record)) : chatCommand(merged, null);
}

/** The command that talks to the model in `folder`, or to `base` with the adapter there. */
export function chatCommand(folder: string, base: string | null): string {
	if (base === null) return `npx arl chat ${shellWord(folder)}`;
	return `npx arl chat ${shellWord(base)} --adapter ${shellWord(folder)}`;
}

/** A word as a shell reads it. */
export function shellWord(word: string): string {
	return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

function reached({ saves }: RunRecord, { training, evaluation }: Figures): Sentence[] {
	const { loss, mean_token_accuracy: accuracy } = training;
	if (loss === undefined) return [];
	const right = accuracy === undefined ? "" : ` Token accuracy ${percent(accuracy.last.value)}.`;
	const sentences = [`${courseText("loss", loss)}.${right}`];
	const evaluated = evaluation.eval_loss;
	if (evaluated !== undefined) {
		const saved = saves.some(({ step }) => step === evaluated.best.step);
		const where = saved ? ` The best is checkpoint-${evaluated.best.step}.` : "";
		sentences.push(`${courseText("eval_loss", evaluated)}.${where}`);
	}
	return sentences.map((text) => ({ label: "reached", text }));
}

/** `loss 0.4321 at step 480, from 6.9012 at step 10; the lowest was 0.4102, at step 470` */
export function courseText(name: string, { first, last, best }: Course): string {
	const now = `${name} ${measure(last.value)} at step ${last.step}`;
	if (first.step === last.step) return now;
	const from = `, from ${measure(first.value)} at step ${first.step}`;
	const which = lowerIsBetter(name) ? "lowest" : "highest";
	if (best.step === last.step) return `${now}, the ${which}${from}`;
	return `${now}${from}; the ${which} was ${measure(best.value)}, at step ${best.step}`;
}

function memory({ start }: RunRecord, { peakRssBytes }: Figures): Sentence {
	const { totalBytes, hostBytes } = start.memory;
	const onGpu = !start.model.device.startsWith("cpu");
	const host = hostBytes > 0 ? ` and ${bytesToTenth(hostBytes)} in host memory` : "";
	const planned = `${bytesToTenth(totalBytes)} planned${onGpu ? ` on ${start.model.device}` : ""}${host}`;
	return {
		label: "memory",
		text: `${planned}; the whole process took at most ${bytesToTenth(peakRssBytes)}${onGpu ? " of host memory" : ""}.`,
	};
}

function waiting({ waitingSeconds, seconds }: Figures): Sentence {
	const share = seconds > 0 ? waitingSeconds / seconds : 0;
	const advice =
		share > MUCH_WAITING ? " Rows came slower than the steps that train them; the next run finds them encoded." : "";
	return {
		label: "waiting",
		text: `${percent(share)} of the time (${duration(waitingSeconds)} of ${duration(seconds)}) went into waiting for rows.${advice}`,
	};
}
