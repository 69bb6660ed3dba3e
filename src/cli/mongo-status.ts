/** `arl mongo status`: shows what AgentRL's collections hold, and missing indexes. Reads only. */
import type { Counts, DatabaseStatus } from "../mongo/status.js";
import { jsonLine } from "../report/index.js";
import { JSON_FLAG, parseCommand } from "./command.js";
import { DATABASE, withDatabase } from "./mongo-database.js";

export const COMMAND = {
	name: "arl mongo status",
	usage: "--db_connection_string URI [--json]",
	about: "Shows what AgentRL's collections hold. Changes nothing.",
	flags: { db_connection_string: DATABASE, json: JSON_FLAG },
};

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[]): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const { flags } = given;
	return withDatabase(flags.db_connection_string, async (connection) => {
		const { databaseStatus } = await import("../mongo/status.js");
		const status = await databaseStatus(connection);
		process.stdout.write(flags.json ? `${jsonLine(status)}\n` : asText(status));
		return 0;
	});
}

function counts(of: Counts): string {
	const entries = Object.entries(of).sort(([a, n], [b, m]) => m - n || (a < b ? -1 : 1));
	const shown = entries.slice(0, 12).map(([value, n]) => `${value} ${n}`);
	return [...shown, ...(entries.length > 12 ? [`and ${entries.length - 12} more values`] : [])].join(", ");
}

function asText({ database, collections, missing_indexes: missing }: DatabaseStatus): string {
	const lines = [database];
	for (const [name, { documents, by, trainable }] of Object.entries(collections)) {
		lines.push(`${name}: ${documents} documents`);
		for (const [field, values] of Object.entries(by)) {
			// A class that every document shares with the collection's name is no news.
			if (field === "_class_id" && Object.keys(values).every((value) => value === name)) continue;
			lines.push(`  ${field.padEnd(14)}${counts(values)}`);
		}
		if (trainable !== null) {
			const rows = Object.keys(trainable).length > 0 ? counts(trainable) : "none";
			lines.push(`  ${"to train on".padEnd(14)}${rows}`);
		}
	}
	if (lines.length === 1) {
		lines.push("no collections of AgentRL; `arl mongo import rows.jsonl` writes rows");
	}
	for (const { collection, command } of missing) {
		lines.push(
			`${collection} has no index for reading rows; if it holds many documents, create one in mongosh:\n  ${command}`,
		);
	}
	return `${lines.join("\n")}\n`;
}
