/** What the commands of `arl mongo` have in common: the database that they speak to, and telling when it is waited for. */
import { Option } from "commander";
import { CONNECTION_VARIABLE } from "../config/environment.js";
import { ArlError } from "../errors.js";
import type { MongoConnection } from "../mongo/connection.js";

/** The option for the database. */
export function databaseOption(): Option {
	return new Option(
		"--db_connection_string <uri>",
		`the database: mongodb://USER:PASSWORD@HOST/DB?authSource=admin (or in the environment, as ${CONNECTION_VARIABLE})`,
	);
}

/** The connection string that was given, by flag or in the environment. */
function connectionString(given: string | undefined): string {
	const uri = given ?? process.env[CONNECTION_VARIABLE] ?? "";
	if (uri !== "") return uri;
	throw new ArlError(
		"ARL_USAGE",
		"no database is given: db_connection_string is missing",
		`For example --db_connection_string mongodb://127.0.0.1:27017/arl; with a password better as the environment variable ${CONNECTION_VARIABLE}`,
	);
}

const WAITS_SECONDS = 60;
const TELL_MILLISECONDS = 500;

/** Opens the database that was given, lets `use` work with it, and closes it. Waiting for a server that is gone is told. */
export async function withDatabase<T>(
	given: string | undefined,
	use: (connection: MongoConnection) => Promise<T>,
): Promise<T> {
	const uri = connectionString(given);
	const { MongoConnection } = await import("../mongo/connection.js");
	const hint = "Once the server is back, give the same command again: nothing is doubled.";
	const connection = await MongoConnection.open(uri, { retrySeconds: WAITS_SECONDS, hint });
	const tell = () => {
		for (const notice of connection.notices.splice(0)) process.stderr.write(`${notice}\n`);
	};
	const timer = setInterval(tell, TELL_MILLISECONDS);
	try {
		return await use(connection);
	} finally {
		clearInterval(timer);
		tell();
		await connection.close();
	}
}
