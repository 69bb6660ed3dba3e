/** `arl mongo export`: writes the rows that training would read from a database into a file. */
import { stat } from "node:fs/promises";
import { described, flag, orNone, requiredString, trainingSchema, type Values } from "../config/index.js";
import { ArlError } from "../errors.js";
import type { MongoConnection } from "../mongo/connection.js";
import { count, jsonLine } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { JSON_FLAG, parseCommand } from "./command.js";
import { DATABASE, leftOut, withDatabase } from "./mongo-database.js";

const { db_source, split, db_match, max_trained_count, on_bad_row } = trainingSchema.shape;

export const COMMAND = {
	name: "arl mongo export",
	usage: "--db_connection_string URI --out FILE [--OPTION VALUE ...]",
	about: "Writes the rows that `arl train` would read into a file. Changes nothing in the database.",
	flags: {
		db_connection_string: DATABASE,
		out: requiredString({
			expects: "a file",
			literal: true,
			description: "The file to write: rows.jsonl or rows.parquet.",
		}),
		db_source,
		split: described(split, "Split of the rows; none: every split."),
		db_match,
		max_trained_count: orNone(
			max_trained_count,
			"Leave out documents that were trained this often; none: leave out nothing.",
		),
		on_bad_row: described(on_bad_row, "error: write nothing if a document is no row; skip: leave such documents out."),
		overwrite: flag("Replace the file if it exists."),
		json: JSON_FLAG,
	},
};

type Options = Values<typeof COMMAND.flags>;

async function checkOut({ out, overwrite }: Options): Promise<void> {
	if (!/\.(jsonl|parquet)$/i.test(out)) {
		throw new ArlError("ARL_USAGE", `--out ${out}: the name must end in .jsonl or .parquet`);
	}
	const found = await stat(out).catch(() => null);
	if (found === null || overwrite) return;
	throw new ArlError("ARL_USAGE", `--out ${out}: the file exists`, "Choose another name, or add --overwrite.");
}

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[]): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const { flags } = given;
	await checkOut(flags);
	return withDatabase(flags.db_connection_string, (connection) => write(connection, flags));
}

async function write(connection: MongoConnection, options: Options): Promise<number> {
	const { exportRows } = await import("../mongo/export.js");
	const { openDatabaseRows } = await import("../mongo/database.js");
	const live = liveLine(process.stderr);
	try {
		const rows = await openDatabaseRows(connection, {
			db_source: options.db_source,
			split: options.split,
			db_match: options.db_match,
			max_trained_count: options.max_trained_count,
			retrained_interval: 1,
		});
		const progress = (done: number) => live?.show([{ text: `${count(done)} of ${count(rows.length)} rows`, keep: 0 }]);
		const result = await exportRows({ rows, out: options.out, skip: options.on_bad_row === "skip", progress });
		live?.clear();
		const left = leftOut(result.bad);
		if (options.json) {
			process.stdout.write(`${jsonLine({ from: rows.name, out: options.out, rows: result.rows, ...left })}\n`);
		} else {
			const more = left.skipped > 0 ? `, ${left.skipped} left out` : "";
			process.stdout.write(`${result.rows} rows of ${rows.name} in ${options.out}${more}\n`);
		}
		return 0;
	} finally {
		live?.clear();
	}
}
