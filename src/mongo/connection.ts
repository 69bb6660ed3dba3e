/**
 * A database connection for a run: retries requests that an interruption breaks until the server is back, up to a limit, and
 * reports waiting and continuing.
 */
import {
	type Db,
	MongoBulkWriteError,
	MongoError,
	MongoNetworkError,
	MongoServerError,
	MongoServerSelectionError,
} from "mongodb";
import { ArlError } from "../errors.js";
import { type Connection, connect } from "./connect.js";

/** How long an interruption may last before the run ends with an error. */
const RETRY_SECONDS = 300;
const FIRST_PAUSE_MS = 200;
const LONGEST_PAUSE_MS = 5_000;

/** A server's refusals that pass: it steps down, shuts down, starts, or has forgotten a cursor. */
const PASSING_CODES = new Set([6, 7, 43, 50, 89, 91, 189, 262, 9001, 10058, 10107, 11600, 11602, 13388, 13435, 13436]);

/** What a socket says that the other side has just closed: the driver passes it on as it is. */
const BROKEN_SOCKET = new Set(["EPIPE", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ETIMEDOUT", "EHOSTUNREACH"]);

/** Whether the same request may succeed a little later. */
function isTransient(error: unknown): boolean {
	if (error instanceof MongoNetworkError || error instanceof MongoServerSelectionError) return true;
	if (error instanceof MongoServerError && PASSING_CODES.has(Number(error.code))) return true;
	// A connection that breaks during a bulk write is reported as an error of the batch, without a code and without a document.
	if (error instanceof MongoBulkWriteError && error.code === undefined) return [error.writeErrors].flat().length === 0;
	if (error instanceof Error && "code" in error && BROKEN_SOCKET.has(String(error.code))) return true;
	if (!(error instanceof MongoError)) return false;
	if (error.hasErrorLabel("RetryableWriteError") || error.hasErrorLabel("TransientTransactionError")) return true;
	return ["MongoTopologyClosedError", "MongoNotConnectedError", "MongoPoolClearedError"].includes(error.name);
}

export interface ConnectionOptions {
	/** How long an interruption may last; absent: `RETRY_SECONDS`. */
	retrySeconds?: number;
	/** What to do when the run gives up. */
	hint?: string;
	/** Aborts waiting. */
	signal?: AbortSignal | null;
}

/** A connection that retries. */
export class MongoConnection {
	/** Notices about waiting; the caller removes those that it reports. */
	readonly notices: string[] = [];
	/** When the current interruption began; null: there is none. */
	private brokenSince: number | null = null;
	private gaveUp = false;

	private constructor(
		private readonly connection: Connection,
		private readonly options: ConnectionOptions,
	) {}

	/** Connects; an unreachable server is reported without retries. */
	static async open(uri: string, options: ConnectionOptions = {}): Promise<MongoConnection> {
		return new MongoConnection(await connect(uri), options);
	}

	get db(): Db {
		return this.connection.db;
	}

	/** For people: hosts and database. */
	get address(): string {
		return this.connection.name;
	}

	/** Another database of the same server. */
	database(name: string): Db {
		return this.connection.client.db(name);
	}

	/**
	 * Runs `action`, and repeats it while the server cannot be reached; it must be idempotent. `doing` completes "while ...".
	 *
	 * @throws ArlError when an interruption lasts too long; at once for errors that waiting does not fix.
	 */
	async attempt<T>(doing: string, action: () => Promise<T>): Promise<T> {
		const limit = this.options.retrySeconds ?? RETRY_SECONDS;
		let pause = FIRST_PAUSE_MS;
		let failing: number | null = null;
		for (;;) {
			try {
				const result = await action();
				if (this.brokenSince !== null) {
					const seconds = Math.round((performance.now() - this.brokenSince) / 1000);
					this.brokenSince = null;
					this.notices.push(`${this.address} responds again after ${seconds} s; the run continues`);
				}
				return result;
			} catch (error) {
				const failure = this.connection.fail(error, doing);
				if (!isTransient(error) || this.gaveUp || this.options.signal?.aborted) throw failure;
				failing ??= performance.now();
				if (performance.now() - failing > limit * 1000)
					throw gaveUpAfter(failure, limit, this.options.hint ?? failure.hint);
				if (this.brokenSince === null) {
					this.brokenSince = performance.now();
					this.notices.push(`${failure.message}; retrying for up to ${limit} s`);
				}
				await new Promise((resolve) => setTimeout(resolve, pause));
				pause = Math.min(LONGEST_PAUSE_MS, pause * 2);
			}
		}
	}

	/** From now on no request is retried. */
	giveUp(): void {
		this.gaveUp = true;
	}

	async close(): Promise<void> {
		await this.connection.close();
	}
}

function gaveUpAfter(failure: ArlError, seconds: number, hint: string): ArlError {
	return new ArlError(failure.code, `${failure.message}; gave up after ${seconds} s`, hint, {
		cause: failure.cause,
	});
}
