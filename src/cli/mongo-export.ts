/** `arl mongo export`: the rows that training would read from a database, as a file. */
import { stat } from "node:fs/promises";
import { InvalidArgumentError, Option } from "commander";
import { countReasons } from "../data/tokens/problems.js";
import { ArlError } from "../errors.js";
import type { MongoConnection } from "../mongo/connection.js";
import type { SelectionOptions } from "../mongo/selection.js";
import { count, jsonLine } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { databaseOption, withDatabase } from "./mongo-options.js";
import { command, parse, wholeNumber } from "./options.js";

interface Options {
	db_connection_string?: string;
	out: string;
	db_source: SelectionOptions["db_source"];
	split: string;
	db_match: SelectionOptions["db_match"];
	max_trained_count?: number;
	on_bad_row: "error" | "skip";
	overwrite?: boolean;
	json?: boolean;
}

function match(word: string): SelectionOptions["db_match"] {
	try {
		const value: unknown = JSON.parse(word);
		if (typeof value === "object" && value !== null && !Array.isArray(value)) {
			return value as SelectionOptions["db_match"];
		}
	} catch {
		// Told below: what is wrong with it is the same in either case.
	}
	throw new InvalidArgumentError('Expected a MongoDB query as JSON, for example \'{"reward": {"$gt": 0}}\'.');
}

function definition() {
	return command("mongo export", "Writes the rows that `arl train` would read into a file. Changes nothing there.")
		.addOption(databaseOption())
		.requiredOption("--out <file>", "rows.jsonl or rows.parquet")
		.addOption(
			new Option("--db_source <class>", "collection of the rows; auto: the one of the two that has rows")
				.choices(["auto", "Record", "DBRecordData"])
				.default("auto"),
		)
		.option("--split <name>", "split of the rows; none: every one", "train")
		.option("--db_match <query>", "a condition besides, as Extended JSON", match, {})
		.option("--max_trained_count <n>", "leave out what was trained this often (default: none)", wholeNumber(1))
		.addOption(
			new Option("--on_bad_row <how>", "error: write nothing if a document is no row; skip: leave such ones out")
				.choices(["error", "skip"])
				.default("error"),
		)
		.option("--overwrite", "replace the file if it is there")
		.option("--json", "the outcome as one JSON value");
}

async function checkOut({ out, overwrite }: Options): Promise<void> {
	if (!/\.(jsonl|parquet)$/i.test(out)) {
		throw new ArlError("ARL_USAGE", `--out ${out}: the name ends in neither .jsonl nor .parquet`);
	}
	const there = await stat(out).catch(() => null);
	if (there === null || overwrite) return;
	throw new ArlError(
		"ARL_USAGE",
		`--out ${out}: the file is there already`,
		"Choose another name, or add --overwrite.",
	);
}

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[]): Promise<number> {
	const options = parse<Options>(definition(), words);
	if (options === null) return 0;
	await checkOut(options);
	return withDatabase(options.db_connection_string, (connection) => write(connection, options));
}

async function write(connection: MongoConnection, options: Options): Promise<number> {
	const { exportRows } = await import("../mongo/export.js");
	const { openDatabaseRows } = await import("../mongo/database.js");
	const live = liveLine(process.stderr);
	try {
		const rows = await openDatabaseRows(connection, {
			db_source: options.db_source,
			split: options.split === "none" ? null : options.split,
			db_match: options.db_match,
			max_trained_count: options.max_trained_count ?? null,
			retrained_interval: 1,
		});
		const progress = (done: number) => live?.show([{ text: `${count(done)} of ${count(rows.length)} rows`, keep: 0 }]);
		const result = await exportRows({ rows, out: options.out, skip: options.on_bad_row === "skip", progress });
		live?.clear();
		for (const { location, reason, message } of result.bad) {
			process.stderr.write(`left out: ${location}: ${reason}: ${message}\n`);
		}
		const skipped = result.bad.length;
		if (options.json) {
			const left = { skipped, reasons: countReasons(result.bad) };
			process.stdout.write(`${jsonLine({ from: rows.name, out: options.out, rows: result.rows, ...left })}\n`);
		} else {
			const more = skipped > 0 ? `, ${skipped} left out` : "";
			process.stdout.write(`${result.rows} rows of ${rows.name} in ${options.out}${more}\n`);
		}
		return 0;
	} finally {
		live?.clear();
	}
}
