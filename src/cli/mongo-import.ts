/** `arl mongo import`: rows of files as documents that AgentRL and `arl train` read. */
import { Option } from "commander";
import { openFiles } from "../data/sources/open.js";
import { badRowsError, countReasons } from "../data/tokens/problems.js";
import { ArlError } from "../errors.js";
import type { MongoConnection } from "../mongo/connection.js";
import { SPLITS, type Split } from "../mongo/documents.js";
import type { ImportResult } from "../mongo/import.js";
import type { ImportKind } from "../mongo/to-documents.js";
import { loadNative, type Native } from "../native.js";
import { count, jsonLine } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { databaseOption, withDatabase } from "./mongo-options.js";
import { command, parse } from "./options.js";

interface Options {
	db_connection_string?: string;
	as: ImportKind;
	split?: Split;
	on_bad_row: "error" | "skip";
	json?: boolean;
}

function definition() {
	return command("mongo import", "Writes rows of files into AgentRL's collections. Doing it again doubles nothing.")
		.usage("FILE... --db_connection_string mongodb://HOST/DB [options]")
		.argument("<files...>", "files of rows, as `arl train --train_file` takes them; rows need `messages`")
		.addOption(databaseOption())
		.addOption(
			new Option(
				"--as <class>",
				"DBRecordData: one document a row. Record: a Record with its Task and a sample for each trained reply",
			)
				.choices(["DBRecordData", "Record"])
				.default("DBRecordData"),
		)
		.addOption(
			new Option("--split <name>", "split of the rows (default: each row's own `split`, else train)").choices(SPLITS),
		)
		.addOption(
			new Option("--on_bad_row <how>", "error: write nothing if a row cannot be used; skip: leave such rows out")
				.choices(["error", "skip"])
				.default("error"),
		)
		.option("--json", "the outcome as one JSON value");
}

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const of = definition();
	const options = parse<Options>(of, words);
	if (options === null) return 0;
	return withDatabase(options.db_connection_string, (connection) => write(connection, options, of.args, core));
}

async function write(
	connection: MongoConnection,
	options: Options,
	entries: string[],
	core: () => Native,
): Promise<number> {
	const { importRows, checkImport } = await import("../mongo/import.js");
	const { source, files, notices } = await openFiles(core(), entries);
	for (const notice of notices) process.stderr.write(`${notice}\n`);
	const live = liveLine(process.stderr);
	try {
		const given = {
			source,
			kind: options.as,
			split: options.split ?? null,
			progress: (rows: number) => live?.show([{ text: `${count(rows)} of ${count(source.length)} rows`, keep: 0 }]),
		};
		const bad = await checkImport(given);
		if (bad.length > 0 && options.on_bad_row === "error") throw badRowsError(bad, source.length);
		if (bad.length === source.length) throw new ArlError("ARL_DATA", `${source.name}: no row can be imported`);
		const result = await importRows(connection, given, new Set(bad.map(({ row }) => row)));
		live?.clear();
		for (const { location, reason, message } of bad) {
			process.stderr.write(`left out: ${location}: ${reason}: ${message}\n`);
		}
		const to = connection.address;
		if (options.json) {
			const left = { skipped: bad.length, reasons: countReasons(bad) };
			process.stdout.write(`${jsonLine({ files, to, as: options.as, rows: source.length, ...result, ...left })}\n`);
		} else process.stdout.write(told(result, options.as, source.length, to, bad.length));
		return 0;
	} finally {
		live?.clear();
		await source.close();
	}
}

function told(result: ImportResult, kind: ImportKind, rows: number, to: string, skipped: number): string {
	const parts = [`${result.written} written`, `${result.present} there already`];
	if (skipped > 0) parts.push(`${skipped} left out`);
	const lines = [`${rows} rows as ${kind} into ${to}: ${parts.join(", ")}`];
	if (kind === "Record" && result.written > 0) {
		lines.push(
			`  documents: ${Object.entries(result.documents)
				.map(([name, n]) => `${n} ${name}`)
				.join(", ")}`,
		);
	}
	if (result.toolsAsText > 0) {
		lines.push(
			`  ${result.toolsAsText} documents hold their tools as JSON text: the server cannot hold them otherwise`,
		);
	}
	return `${lines.join("\n")}\n`;
}
