/**
 * Opens a database from a connection string, and says in plain words why it cannot be had. Knows the driver; nothing of
 * what the database holds. No transactions and no change streams: a standalone server is enough.
 */
import type { Db, MongoClient, MongoClientOptions } from "mongodb";
import { ArlError, type ErrorCode, messageOf } from "../errors.js";
import { hideSecrets, redactUri, uriParts } from "./redact.js";

/** An open database. */
export interface Connection {
	readonly client: MongoClient;
	readonly db: Db;
	/** For people: `host:27017/db`, without user and password. */
	readonly name: string;
	/** Any thrown value as an error of this project, without a secret in it. `doing` completes "while ...". */
	fail(thrown: unknown, doing: string): ArlError;
	close(): Promise<void>;
}

const EXAMPLE = "mongodb://USER:PASSWORD@HOST:27017/DB?authSource=admin";
const ENCODE_HINT = "in a user's name or password @ : / ? # % are written %40 %3A %2F %3F %23 %25";

/** Defaults where the connection string says nothing: a server that is gone is told in seconds, a slow answer is waited for. */
const DEFAULTS: MongoClientOptions = {
	appName: "arl",
	serverSelectionTimeoutMS: 10_000,
	connectTimeoutMS: 10_000,
	socketTimeoutMS: 120_000,
	maxPoolSize: 8,
	// Whatever is written here may be written twice and counts once; sessions that a plain server lacks are not needed.
	retryWrites: false,
};

/** Opens the database that `uri` names. Throws `ARL_CONFIG` (the string is wrong, access is refused) or `ARL_IO` (no server). */
export async function connect(uri: string): Promise<Connection> {
	const parts = uriParts(uri);
	if (parts === null) {
		throw new ArlError(
			"ARL_CONFIG",
			/^mongodb(\+srv)?:\/\//i.test(uri.trim())
				? "db_connection_string: cannot be read: a user's name or password holds a character that must be percent-encoded"
				: "db_connection_string: not a connection string: it begins with neither mongodb:// nor mongodb+srv://",
			`For example ${EXAMPLE}; ${ENCODE_HINT}`,
		);
	}
	if (parts.database === "") {
		throw new ArlError(
			"ARL_CONFIG",
			`db_connection_string: no database is named in ${redactUri(uri)}`,
			`Name it after the host: ${EXAMPLE} (authSource is where the user is known, most often admin)`,
		);
	}
	const { MongoClient } = await import("mongodb");
	const given = new Set(parts.options.map(([name]) => name.toLowerCase()));
	const defaults = Object.fromEntries(Object.entries(DEFAULTS).filter(([name]) => !given.has(name.toLowerCase())));
	const name = `${parts.hosts}/${parts.database}`;
	const fail = (thrown: unknown, doing: string) => mongoError(thrown, uri, name, doing);
	let client: MongoClient;
	try {
		client = new MongoClient(uri.trim(), defaults);
	} catch (thrown) {
		const reason = hideSecrets(messageOf(thrown), uri);
		throw new ArlError("ARL_CONFIG", `db_connection_string: ${reason} (${redactUri(uri)})`, `Note: ${ENCODE_HINT}.`);
	}
	try {
		await client.connect();
		const db = client.db();
		// Connecting alone asks for no rights; this does, so that a missing right is told now.
		await db.listCollections({}, { nameOnly: true, authorizedCollections: true }).toArray();
		return { client, db, name, fail, close: () => client.close() };
	} catch (thrown) {
		await client.close().catch(() => {});
		throw fail(thrown, "connecting");
	}
}

interface Told {
	code: ErrorCode;
	what: string;
	hint: string;
}

const AUTH_HINT =
	"Check user and password, percent-encode special characters in them, and name the database that knows the user: ?authSource=admin";

/** Reads the kind of a failure from what the driver says of it. */
function tell(error: Error, text: string, name: string): Told {
	const code = "code" in error ? error.code : undefined;
	if (code === 18 || code === 8000 || /authentication failed|auth failed|bad auth/i.test(text)) {
		return { code: "ARL_CONFIG", what: `${name}: the server refuses user or password`, hint: AUTH_HINT };
	}
	if (code === 13 || /requires authentication|not authorized|command .* requires auth/i.test(text)) {
		return {
			code: "ARL_CONFIG",
			what: `${name}: the user has no right to do this`,
			hint: "Give a user that may read and write this database (role readWrite): mongodb://USER:PASSWORD@HOST/DB?authSource=admin",
		};
	}
	if (/wire version/i.test(text)) {
		return { code: "ARL_IO", what: `${name}: the server is too old`, hint: "MongoDB 4.4 or newer is needed." };
	}
	if (/ENOENT|EACCES/.test(text)) {
		const hint = "Check tlsCAFile and tlsCertificateKeyFile; relative paths start at the working directory.";
		return { code: "ARL_CONFIG", what: `${name}: a file that db_connection_string names cannot be read`, hint };
	}
	if (/certificate|self.signed|\btls\b|\bssl\b|ERR_SSL|ERR_TLS|EPROTO|wrong version number/i.test(text)) {
		return {
			code: "ARL_IO",
			what: `${name}: no TLS connection`,
			hint: "Check tls=true|false; a certificate of one's own authority needs tlsCAFile=/path/ca.pem, and the host must be the one that the certificate names.",
		};
	}
	if (/ENOTFOUND|EAI_AGAIN|ESERVFAIL|ENODATA|querySrv/.test(text)) {
		return { code: "ARL_IO", what: `${name}: the host's name is not known`, hint: "Check the name of the host." };
	}
	if (error.name === "MongoServerSelectionError" || /ECONNREFUSED|ETIMEDOUT|EHOSTUNREACH|ENETUNREACH/.test(text)) {
		return {
			code: "ARL_IO",
			what: `${name}: no server answers`,
			hint: "Check host and port, that the server runs, and that a firewall lets you through. A server that expects TLS needs tls=true, and for a single member of a replica set directConnection=true helps. `npm run mongo` starts a server for trying things out.",
		};
	}
	if (
		/MongoNetwork|PoolCleared|MongoNotConnected|MongoTopologyClosed|connection .* (closed|timed out)|ECONNRESET/.test(
			`${error.name}: ${text}`,
		)
	) {
		return { code: "ARL_IO", what: `${name}: the connection broke`, hint: "Try again; is the server still running?" };
	}
	return { code: "ARL_IO", what: `${name}: the database answers with an error`, hint: "" };
}

/** All messages of an error and of what caused it. */
function messages(error: Error): string[] {
	const causes = error.cause instanceof Error ? messages(error.cause) : [];
	return [...new Set([error.message || error.name, ...causes])];
}

function mongoError(thrown: unknown, uri: string, name: string, doing: string): ArlError {
	if (thrown instanceof ArlError) return thrown;
	const error = thrown instanceof Error ? thrown : new Error(String(thrown));
	const text = messages(error).join(": ");
	const { code, what, hint } = tell(error, `${error.name}: ${text}`, name);
	// The driver's own error may quote the connection string in its message or its fields: only its words go on, cleaned.
	const cause = new Error(hideSecrets(text, uri));
	cause.name = error.name;
	cause.stack = hideSecrets(error.stack ?? text, uri);
	return new ArlError(code, `${what} (while ${doing}: ${hideSecrets(text, uri)})`, hint, { cause });
}
