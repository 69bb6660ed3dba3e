/**
 * A connection to a MongoDB database: opened with what a user gave, held through interruptions, and never telling the
 * password. Every error of the driver leaves here as an `ArlError`.
 */
import { type Db, MongoClient, MongoError, MongoNetworkError, MongoServerError, MongoServerSelectionError } from "mongodb";
import { ArlError } from "../errors.js";

/** How long an interruption may last before the run ends with an error. */
export const RETRY_SECONDS = 300;
const FIRST_PAUSE_MS = 200;
const LONGEST_PAUSE_MS = 5_000;
/** How long the first connection may take: a wrong address should be told soon. */
const CONNECT_MS = 10_000;

/** A server's refusals that pass: it steps down, shuts down, starts, or has forgotten a cursor. */
const PASSING_CODES = new Set([6, 7, 43, 50, 89, 91, 189, 262, 9001, 10058, 10107, 11600, 11602, 13388, 13435, 13436]);

/** Whether the same request may succeed a little later. */
function isPassing(error: unknown): boolean {
	if (error instanceof MongoNetworkError || error instanceof MongoServerSelectionError) return true;
	if (error instanceof MongoServerError && PASSING_CODES.has(Number(error.code))) return true;
	if (!(error instanceof MongoError)) return false;
	if (error.hasErrorLabel("RetryableWriteError") || error.hasErrorLabel("TransientTransactionError")) return true;
	return ["MongoTopologyClosedError", "MongoNotConnectedError", "MongoPoolClearedError"].includes(error.name);
}

/** The parts of a connection string that nobody may read. */
function secretsOf(uri: string): string[] {
	const found = new Set<string>([uri]);
	const address = /^[a-z0-9+.-]+:\/\/(.*)@/is.exec(uri)?.[1];
	if (address !== undefined) {
		found.add(address);
		const colon = address.indexOf(":");
		const password = colon < 0 ? "" : address.slice(colon + 1);
		for (const secret of [password, decoded(password)]) if (secret.length > 2) found.add(secret);
	}
	for (const [, value] of uri.matchAll(/[?&][^=&]*(?:password|secret|token)[^=&]*=([^&]+)/gi)) {
		for (const secret of [value ?? "", decoded(value ?? "")]) if (secret.length > 2) found.add(secret);
	}
	return [...found].sort((a, b) => b.length - a.length);
}

function decoded(text: string): string {
	try {
		return decodeURIComponent(text);
	} catch {
		return text;
	}
}

/** What may be known of an address: hosts and database, without user, password and options. */
export function publicAddress(uri: string): string {
	const rest = uri.replace(/^[a-z0-9+.-]+:\/\//i, "").replace(/^.*@/s, "");
	return `mongodb://${rest.replace(/\?.*$/s, "")}`;
}

export interface ConnectOptions {
	/** How long an interruption may last; absent: `RETRY_SECONDS`. */
	retrySeconds?: number;
	/** Where waiting and going on is told. */
	notice?: (message: string) => void;
	/** Ends waiting. */
	signal?: AbortSignal | null;
}

/** An open connection. */
export class MongoConnection {
	private constructor(
		private readonly client: MongoClient,
		readonly db: Db,
		/** For people: hosts and database. */
		readonly address: string,
		private readonly secrets: string[],
		private readonly options: ConnectOptions,
	) {}

	/**
	 * Connects and makes sure that a server answers.
	 *
	 * @throws ArlError `ARL_CONFIG` for a connection string that is none, `ARL_IO` where no server answers or lets one in.
	 */
	static async open(uri: string, options: ConnectOptions = {}): Promise<MongoConnection> {
		const secrets = secretsOf(uri);
		const address = publicAddress(uri);
		let client: MongoClient;
		try {
			client = new MongoClient(uri, {
				appName: "arl",
				serverSelectionTimeoutMS: CONNECT_MS,
				connectTimeoutMS: CONNECT_MS,
				maxPoolSize: 8,
				retryReads: true,
				// An update that is repeated finds its own mark; sessions that a plain server lacks are not needed.
				retryWrites: false,
			});
		} catch (error) {
			const reason = scrub(error instanceof Error ? error.message : String(error), secrets);
			throw new ArlError(
				"ARL_CONFIG",
				`db_connection_string: ${reason}`,
				"Expected mongodb://USER:PASSWORD@HOST:PORT/DATABASE; in user and password @ : / ? # [ ] and % are written as %40 %3A %2F %3F %23 %5B %5D %25.",
			);
		}
		if (client.options.dbName === "test" && !/\/\/[^/]*\/[^?/]/.test(uri.replace(/\/\/.*@/s, "//"))) {
			throw new ArlError(
				"ARL_CONFIG",
				`db_connection_string: ${address} names no database`,
				"Put its name behind the host: mongodb://HOST:PORT/DATABASE (AgentRL's examples use the name of the run). With a user, ?authSource=admin may be needed.",
			);
		}
		const connection = new MongoConnection(client, client.db(), address, secrets, options);
		try {
			await connection.db.command({ ping: 1 });
			return connection;
		} catch (error) {
			await client.close().catch(() => {});
			throw connection.failure(error);
		}
	}

	/** Another database of the same server. */
	database(name: string): Db {
		return this.client.db(name);
	}

	/**
	 * Does `action`, again and again while the server cannot be reached. It must be such that doing it twice is doing it
	 * once.
	 *
	 * @throws ArlError `ARL_IO` when an interruption lasts too long; at once for what no waiting mends.
	 */
	async attempt<T>(action: () => Promise<T>): Promise<T> {
		const limit = this.options.retrySeconds ?? RETRY_SECONDS;
		let pause = FIRST_PAUSE_MS;
		let since: number | null = null;
		let told = false;
		for (;;) {
			try {
				const result = await action();
				if (told) this.options.notice?.(`${this.address} answers again; the run goes on`);
				return result;
			} catch (error) {
				const now = performance.now();
				since ??= now;
				if (!isPassing(error) || this.options.signal?.aborted) throw this.failure(error);
				if (now - since > limit * 1000) throw this.failure(error, Math.round((now - since) / 1000));
				if (!told) {
					told = true;
					const reason = scrub(error instanceof Error ? error.message : String(error), this.secrets);
					this.options.notice?.(`${this.address} does not answer (${reason}); waiting for it, up to ${limit} s`);
				}
				await new Promise((resolve) => setTimeout(resolve, pause));
				pause = Math.min(LONGEST_PAUSE_MS, pause * 2);
			}
		}
	}

	/** An error of the driver as one of this program, without the password. */
	failure(error: unknown, waited = 0): ArlError {
		if (error instanceof ArlError) return error;
		const message = scrub(error instanceof Error ? error.message : String(error), this.secrets);
		const code = error instanceof MongoServerError ? Number(error.code) : 0;
		const after = waited > 0 ? ` for ${waited} s` : "";
		if (isPassing(error)) {
			return new ArlError(
				"ARL_IO",
				`${this.address} does not answer${after}: ${message}`,
				waited > 0
					? "What was trained is in the last checkpoint: go on with --resume_from_checkpoint latest once the server is back."
					: "Check the address, and that the server runs and can be reached from here.",
			);
		}
		if (code === 13 || code === 18 || code === 8000 || /auth/i.test(message)) {
			return new ArlError(
				"ARL_IO",
				`${this.address} refuses: ${message}`,
				"Check user and password in db_connection_string, the database of the account (?authSource=admin), and its rights: reading, and writing unless --mongo_write_back none.",
			);
		}
		return new ArlError("ARL_IO", `${this.address}: ${message}`);
	}

	async close(): Promise<void> {
		await this.client.close();
	}
}

function scrub(text: string, secrets: readonly string[]): string {
	return secrets.reduce((result, secret) => result.replaceAll(secret, "***"), text);
}
