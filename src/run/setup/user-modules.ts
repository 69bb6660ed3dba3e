/** Data sets and converting functions: given by the caller, or loaded from the modules that `dataset` and `convert` name. */
import { importDefault, publicApi } from "../../config/module.js";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { redact } from "../../config/values.js";
import { checkDataset } from "../../data/sources/custom.js";
import { ArlError, messageOf } from "../../errors.js";
import type { RowsFromCode } from "./dataset.js";

/** The argument of a function that creates a data set. */
export interface DatasetArguments {
	/** The options of the run, each with a value. */
	readonly args: AgentTrainingConfig;
	/** What the rows are for. */
	readonly split: "train";
}

/** Loads what the options name. Throws `ARL_CONFIG` if it is no data set or no function, or if it is given twice. */
export async function loadCode(args: AgentTrainingConfig, given: RowsFromCode): Promise<RowsFromCode> {
	let { dataset, convert } = given;
	if (args.dataset !== null) {
		if (dataset !== null) throw twice("dataset", "train_dataset");
		dataset = await loadDataset(args.dataset, { args, split: "train" });
	}
	if (args.convert !== null) {
		if (convert !== null) throw twice("convert", "convert_record_to_data_func");
		const loaded = await load("convert", args.convert);
		if (!isFunction(loaded)) throw noFunction("convert", args.convert, loaded);
		convert = loaded;
	}
	let evalMetric = given.evalMetric ?? null;
	if (args.eval_metric !== null) {
		if (evalMetric !== null) throw twice("args.eval_metric", "eval_metric");
		const loaded = await load("eval_metric", args.eval_metric);
		if (!isFunction(loaded)) throw noFunction("eval_metric", args.eval_metric, loaded);
		evalMetric = loaded;
	}
	return { ...given, dataset, convert, evalMetric };
}

function twice(option: string, name: string): ArlError {
	return new ArlError("ARL_CONFIG", `${option} and ${name} are both given`, "Give one of them.");
}

function isFunction(value: unknown): value is (...values: unknown[]) => never {
	return typeof value === "function";
}

async function load(option: string, path: string): Promise<unknown> {
	try {
		return await importDefault(path, await publicApi());
	} catch (error) {
		throw failed(option, path, error);
	}
}

function failed(option: string, path: string, error: unknown): ArlError {
	if (error instanceof ArlError) return new ArlError(error.code, `${option}: ${error.message}`, error.hint);
	const message = `${option} ${path}: ${redact(messageOf(error))}`;
	return new ArlError("ARL_CONFIG", message, "The module must load and have a default export.", { cause: error });
}

const EXAMPLES = {
	convert: "(row) => ({ messages: row.chat })",
	eval_metric: "(row, reply) => reply.text.includes(row.answer) ? 1 : 0",
} as const;

function noFunction(option: keyof typeof EXAMPLES, path: string, loaded: unknown): ArlError {
	const found = loaded === undefined ? "it has no default export" : `it is of type ${typeof loaded}`;
	return new ArlError(
		"ARL_CONFIG",
		`${option} ${path}: the default export should be a function of a row, and ${found}`,
		`For example: export default ${EXAMPLES[option]};`,
	);
}

async function loadDataset(path: string, about: DatasetArguments): Promise<RowsFromCode["dataset"]> {
	const loaded = await load("dataset", path);
	let dataset = loaded;
	if (isFunction(loaded)) {
		try {
			dataset = await loaded(about);
		} catch (error) {
			throw failed("dataset", path, error);
		}
	}
	checkDataset(dataset, `dataset ${path}: the default export`);
	return dataset;
}
