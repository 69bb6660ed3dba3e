/** `arl mongo import`: writes rows of files as documents that AgentRL and `arl train` read. */
import { choice, choiceOrNone, described, trainingSchema, type Values } from "../config/index.js";
import { openFiles } from "../data/sources/open.js";
import type { MongoConnection } from "../mongo/connection.js";
import { SPLITS } from "../mongo/documents.js";
import type { ImportResult } from "../mongo/import.js";
import type { ImportKind } from "../mongo/to-documents.js";
import { loadNative, type Native } from "../native.js";
import { count, jsonLine } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { JSON_FLAG, parseCommand } from "./command.js";
import { DATABASE, leftOut, withDatabase } from "./mongo-database.js";

export const COMMAND = {
	name: "arl mongo import",
	usage: "FILE... --db_connection_string URI [--OPTION VALUE ...]",
	about: `Writes rows of files into AgentRL's collections. Importing the same rows again changes nothing.

FILE...: files of rows, as \`arl train --train_file\` takes them. Rows need \`messages\`.`,
	words: { noun: "a file of rows", least: 1, most: Number.POSITIVE_INFINITY },
	flags: {
		db_connection_string: DATABASE,
		as: choice(["DBRecordData", "Record"], {
			default: "DBRecordData",
			description:
				"Collection of the documents. DBRecordData: one document a row. Record: a Record with its Task, and a sample for each trained reply.",
		}),
		split: choiceOrNone(SPLITS, { description: "Split of the rows; none: each row's own `split`, else train." }),
		on_bad_row: described(
			trainingSchema.shape.on_bad_row,
			"error: write nothing if a row cannot be used; skip: leave such rows out.",
		),
		json: JSON_FLAG,
	},
};

type Options = Values<typeof COMMAND.flags>;

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const { flags, words: entries } = given;
	return withDatabase(flags.db_connection_string, (connection) => write(connection, flags, entries, core));
}

async function write(
	connection: MongoConnection,
	options: Options,
	entries: string[],
	core: () => Native,
): Promise<number> {
	const { importChecked } = await import("../mongo/import.js");
	const { source, files, notices } = await openFiles(core(), entries);
	for (const notice of notices) process.stderr.write(`${notice}\n`);
	const live = liveLine(process.stderr);
	try {
		const given = {
			source,
			kind: options.as,
			split: options.split,
			progress: (rows: number) => live?.show([{ text: `${count(rows)} of ${count(source.length)} rows`, keep: 0 }]),
		};
		const { bad, ...result } = await importChecked(connection, given, options.on_bad_row === "skip");
		live?.clear();
		const left = leftOut(bad);
		const to = connection.address;
		if (options.json) {
			process.stdout.write(`${jsonLine({ files, to, as: options.as, rows: source.length, ...result, ...left })}\n`);
		} else process.stdout.write(summary(result, options.as, source.length, to, bad.length));
		return 0;
	} finally {
		live?.clear();
		await source.close();
	}
}

function summary(result: ImportResult, kind: ImportKind, rows: number, to: string, skipped: number): string {
	const parts = [`${result.written} written`, `${result.present} present already`];
	if (skipped > 0) parts.push(`${skipped} left out`);
	const lines = [`${rows} rows as ${kind} into ${to}: ${parts.join(", ")}`];
	if (kind === "Record" && result.written > 0) {
		const documents = Object.entries(result.documents).map(([name, n]) => `${n} ${name}`);
		lines.push(`  documents: ${documents.join(", ")}`);
	}
	if (result.toolsAsText > 0) {
		lines.push(
			`  ${result.toolsAsText} documents store their tools as JSON text, because the server cannot store them as objects`,
		);
	}
	return `${lines.join("\n")}\n`;
}
