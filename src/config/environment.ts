/** Options that may come from the environment: secrets, which a command line would show to every user of the machine. */
import type { Layer } from "./resolve.js";

/** The variable that replaces `db_connection_string`. */
export const CONNECTION_VARIABLE = "ARL_DB_CONNECTION_STRING";

/** The variable that replaces `webhook_url`, if `report_to` names the webhook. */
export const WEBHOOK_VARIABLE = "ARL_WEBHOOK_URL";

/** Options that ask for rows of a database. */
const DATABASE_OPTIONS = ["db_source", "db_match", "mongo_write_back"];

/**
 * The layer of options from the environment, the weakest. The variable counts if no other rows are given, or if another
 * option asks for a database: set for a whole shell, it must not add its rows to a run on files.
 */
export function environmentLayer(layers: readonly Layer[], env: NodeJS.ProcessEnv = process.env): Layer[] {
	const given = new Map(layers.flatMap(({ values }) => [...values]));
	const others = given.has("train_file") || given.has("dataset");
	const wantsRows = !others || DATABASE_OPTIONS.some((name) => given.has(name));
	const wantsWebhook = [given.get("report_to")].flat().includes("webhook");
	return [
		...(wantsRows ? layerOf(CONNECTION_VARIABLE, "db_connection_string", env) : []),
		...(wantsWebhook ? layerOf(WEBHOOK_VARIABLE, "webhook_url", env) : []),
	];
}

function layerOf(variable: string, option: string, env: NodeJS.ProcessEnv): Layer[] {
	const value = env[variable];
	return value === undefined || value === "" ? [] : [{ origin: variable, values: [[option, value]] }];
}
