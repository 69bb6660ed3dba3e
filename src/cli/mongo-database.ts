/** What the commands of `arl mongo` share: the option for the database, its connection, and notices while it is retried. */
import { CONNECTION_VARIABLE } from "../config/environment.js";
import { described, trainingSchema } from "../config/index.js";
import { type BadRow, countReasons } from "../data/tokens/problems.js";
import { ArlError } from "../errors.js";
import type { MongoConnection } from "../mongo/connection.js";

/** The option for the database. */
export const DATABASE = described(
	trainingSchema.shape.db_connection_string,
	`The database; none: the environment variable ${CONNECTION_VARIABLE}, which no other user of the machine can read.`,
);

/** The connection string that was given, by flag or in the environment. */
function connectionString(given: string | null): string {
	const uri = given ?? process.env[CONNECTION_VARIABLE] ?? "";
	if (uri !== "") return uri;
	throw new ArlError(
		"ARL_USAGE",
		"no database is given: db_connection_string is missing",
		`For example --db_connection_string mongodb://127.0.0.1:27017/arl; if it has a password, better as the environment variable ${CONNECTION_VARIABLE}`,
	);
}

const WAITS_SECONDS = 60;
const REPORT_MILLISECONDS = 500;

/** Opens the database that was given, lets `use` work with it, and closes it. Reports each wait for a server that is gone. */
export async function withDatabase<T>(
	given: string | null,
	use: (connection: MongoConnection) => Promise<T>,
): Promise<T> {
	const uri = connectionString(given);
	const { MongoConnection } = await import("../mongo/connection.js");
	const hint = "Once the server is back, run the same command again: it imports nothing twice.";
	const connection = await MongoConnection.open(uri, { retrySeconds: WAITS_SECONDS, hint });
	const report = () => {
		for (const notice of connection.notices.splice(0)) process.stderr.write(`${notice}\n`);
	};
	const timer = setInterval(report, REPORT_MILLISECONDS);
	try {
		return await use(connection);
	} finally {
		clearInterval(timer);
		report();
		await connection.close();
	}
}

/** Reports each row that was left out on stderr; returns what `--json` reports of them. */
export function leftOut(bad: BadRow[]): { skipped: number; reasons: Record<string, number> } {
	for (const { location, reason, message } of bad) {
		process.stderr.write(`left out: ${location}: ${reason}: ${message}\n`);
	}
	return { skipped: bad.length, reasons: countReasons(bad) };
}
