/** Options that may come from the environment: secrets, which a command line would show to every user of the machine. */
import type { Layer } from "./resolve.js";

/** The variable that replaces `db_connection_string`. */
export const CONNECTION_VARIABLE = "ARL_DB_CONNECTION_STRING";

/** Options that ask for rows of a database. */
const DATABASE_OPTIONS = ["db_source", "db_match", "mongo_write_back"];

/**
 * The layer of options from the environment, the weakest. The variable counts if no other rows are given, or if another
 * option asks for a database: set for a whole shell, it must not add its rows to a run on files.
 */
export function environmentLayer(layers: readonly Layer[], env: NodeJS.ProcessEnv = process.env): Layer[] {
	const value = env[CONNECTION_VARIABLE];
	if (value === undefined || value === "") return [];
	const given = new Set(layers.flatMap(({ values }) => [...values].map(([name]) => name)));
	const others = given.has("train_file") || given.has("dataset");
	if (others && !DATABASE_OPTIONS.some((name) => given.has(name))) return [];
	return [{ origin: CONNECTION_VARIABLE, values: [["db_connection_string", value]] }];
}
