/**
 * Opens a database from a connection string, and explains in plain words why it cannot. Knows the driver, and nothing about the
 * documents. Uses neither transactions nor change streams: a standalone server suffices.
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
	/** Any thrown value as an `ArlError` without secrets. `doing` completes "while ...". */
	fail(thrown: unknown, doing: string): ArlError;
	close(): Promise<void>;
}

const EXAMPLE = "mongodb://USER:PASSWORD@HOST:27017/DB?authSource=admin";
const ENCODE_HINT = "in a user's name or password @ : / ? # % are written %40 %3A %2F %3F %23 %25";

/** Defaults unless the connection string says otherwise: reports an unreachable server in seconds, and waits for slow responses. */
const DEFAULTS: MongoClientOptions = {
	appName: "arl",
	serverSelectionTimeoutMS: 10_000,
	connectTimeoutMS: 10_000,
	socketTimeoutMS: 120_000,
	maxPoolSize: 8,
	// All writes are idempotent, so that sessions, which a standalone server lacks, are not needed.
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
				: "db_connection_string: not a connection string: it must begin with mongodb:// or mongodb+srv://",
			`For example ${EXAMPLE}; ${ENCODE_HINT}`,
		);
	}
	if (parts.database === "") {
		throw new ArlError(
			"ARL_CONFIG",
			`db_connection_string: ${redactUri(uri)} names no database`,
			`Name it after the host: ${EXAMPLE} (authSource is the database that has the user, usually admin)`,
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
		// Connecting needs no rights; this request does, so that a missing right is reported now.
		await db.listCollections({}, { nameOnly: true, authorizedCollections: true }).toArray();
		return { client, db, name, fail, close: () => client.close() };
	} catch (thrown) {
		await client.close().catch(() => {});
		throw fail(thrown, "connecting");
	}
}

interface Diagnosis {
	code: ErrorCode;
	what: string;
	hint: string;
}

const AUTH_HINT =
	"Check user and password, percent-encode special characters in them, and name the database that has the user: ?authSource=admin";

/** Determines the kind of a failure from the driver's error. */
function diagnose(error: Error, text: string, name: string): Diagnosis {
	const code = "code" in error ? error.code : undefined;
	if (code === 18 || code === 8000 || /authentication failed|auth failed|bad auth/i.test(text)) {
		return { code: "ARL_CONFIG", what: `${name}: the server refused user or password`, hint: AUTH_HINT };
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
			hint: "Check tls=true|false; a certificate of a private authority needs tlsCAFile=/path/ca.pem, and the host must be the one that the certificate names.",
		};
	}
	if (/ENOTFOUND|EAI_AGAIN|ESERVFAIL|ENODATA|querySrv/.test(text)) {
		return { code: "ARL_IO", what: `${name}: unknown host name`, hint: "Check the name of the host." };
	}
	if (error.name === "MongoServerSelectionError" || /ECONNREFUSED|ETIMEDOUT|EHOSTUNREACH|ENETUNREACH/.test(text)) {
		return {
			code: "ARL_IO",
			what: `${name}: no server answers`,
			hint: "Check host and port, that the server is running, and that no firewall blocks it. A server that expects TLS needs tls=true; for a single member of a replica set try directConnection=true. `npm run mongo` starts a server for trying things out.",
		};
	}
	if (
		/MongoNetwork|PoolCleared|MongoNotConnected|MongoTopologyClosed|connection .* (closed|timed out)|ECONNRESET/.test(
			`${error.name}: ${text}`,
		)
	) {
		return { code: "ARL_IO", what: `${name}: the connection broke`, hint: "Try again; is the server still running?" };
	}
	return { code: "ARL_IO", what: `${name}: the database returned an error`, hint: "" };
}

/** All messages of an error and its causes. */
function messages(error: Error): string[] {
	const causes = error.cause instanceof Error ? messages(error.cause) : [];
	return [...new Set([error.message || error.name, ...causes])];
}

function mongoError(thrown: unknown, uri: string, name: string, doing: string): ArlError {
	if (thrown instanceof ArlError) return thrown;
	const error = thrown instanceof Error ? thrown : new Error(String(thrown));
	const text = messages(error).join(": ");
	const { code, what, hint } = diagnose(error, `${error.name}: ${text}`, name);
	// The driver's error may quote the connection string in its message or fields: only its redacted text is passed on.
	const cause = new Error(hideSecrets(text, uri));
	cause.name = error.name;
	cause.stack = hideSecrets(error.stack ?? text, uri);
	return new ArlError(code, `${what} (while ${doing}: ${hideSecrets(text, uri)})`, hint, { cause });
}
