/** `arl mongo status`: what AgentRL's collections hold, and the index that is missing. Reads only. */
import type { Counts, DatabaseStatus } from "../mongo/status.js";
import { jsonLine } from "../report/index.js";
import { databaseOption, withDatabase } from "./mongo-options.js";
import { command, parse } from "./options.js";

interface Options {
	db_connection_string?: string;
	json?: boolean;
}

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[]): Promise<number> {
	const definition = command("mongo status", "Shows what AgentRL's collections hold. Changes nothing.")
		.addOption(databaseOption())
		.option("--json", "as one JSON value");
	const options = parse<Options>(definition, words);
	if (options === null) return 0;
	return withDatabase(options.db_connection_string, async (connection) => {
		const { databaseStatus } = await import("../mongo/status.js");
		const status = await databaseStatus(connection);
		process.stdout.write(options.json ? `${jsonLine(status)}\n` : told(status));
		return 0;
	});
}

function counts(of: Counts): string {
	const entries = Object.entries(of).sort(([a, n], [b, m]) => m - n || (a < b ? -1 : 1));
	const shown = entries.slice(0, 12).map(([value, n]) => `${value} ${n}`);
	return [...shown, ...(entries.length > 12 ? [`and ${entries.length - 12} more values`] : [])].join(", ");
}

function told({ database, collections, missing_indexes: missing }: DatabaseStatus): string {
	const lines = [database];
	for (const [name, { documents, by, trainable }] of Object.entries(collections)) {
		lines.push(`${name}: ${documents} documents`);
		for (const [field, values] of Object.entries(by)) {
			// That every document is of the collection's own class goes without saying.
			if (field === "_class_id" && Object.keys(values).every((value) => value === name)) continue;
			lines.push(`  ${field.padEnd(14)}${counts(values)}`);
		}
		if (trainable !== null) {
			const rows = Object.keys(trainable).length > 0 ? counts(trainable) : "none";
			lines.push(`  ${"to train on".padEnd(14)}${rows}`);
		}
	}
	if (lines.length === 1) {
		lines.push("holds none of AgentRL's collections; `arl mongo import rows.jsonl` writes rows");
	}
	for (const { collection, command: makes } of missing) {
		lines.push(`${collection} has no index for reading rows; with many documents make one in mongosh:\n  ${makes}`);
	}
	return `${lines.join("\n")}\n`;
}
