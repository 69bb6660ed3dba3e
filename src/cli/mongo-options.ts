/** What the commands of `arl mongo` have in common: the database that they speak to. */
import { Option } from "commander";
import { CONNECTION_VARIABLE } from "../config/environment.js";
import { ArlError } from "../errors.js";

/** The option for the database. */
export function databaseOption(): Option {
	return new Option(
		"--db_connection_string <uri>",
		`the database: mongodb://USER:PASSWORD@HOST/DB?authSource=admin (or in the environment, as ${CONNECTION_VARIABLE})`,
	);
}

/** The connection string that was given, by flag or in the environment. */
export function connectionString(given: string | undefined): string {
	const uri = given ?? process.env[CONNECTION_VARIABLE] ?? "";
	if (uri !== "") return uri;
	throw new ArlError(
		"ARL_USAGE",
		"no database is given: db_connection_string is missing",
		`For example --db_connection_string mongodb://127.0.0.1:27017/arl; with a password better as the environment variable ${CONNECTION_VARIABLE}`,
	);
}
