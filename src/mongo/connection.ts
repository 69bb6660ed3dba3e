/**
 * A database for a run: a request that an interruption spoils is made again until the server is back, up to a limit. Waiting and
 * going on is told.
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
function isPassing(error: unknown): boolean {
	if (error instanceof MongoNetworkError || error instanceof MongoServerSelectionError) return true;
	if (error instanceof MongoServerError && PASSING_CODES.has(Number(error.code))) return true;
	// A connection that breaks within a bulk write comes as an error of the batch, without a code and without a document.
	if (error instanceof MongoBulkWriteError && error.code === undefined) return [error.writeErrors].flat().length === 0;
	if (error instanceof Error && "code" in error && BROKEN_SOCKET.has(String(error.code))) return true;
	if (!(error instanceof MongoError)) return false;
	if (error.hasErrorLabel("RetryableWriteError") || error.hasErrorLabel("TransientTransactionError")) return true;
	return ["MongoTopologyClosedError", "MongoNotConnectedError", "MongoPoolClearedError"].includes(error.name);
}

export interface ConnectionOptions {
	/** How long an interruption may last; absent: `RETRY_SECONDS`. */
	retrySeconds?: number;
	/** What to do when waiting was in vain. */
	hint?: string;
	/** Ends waiting. */
	signal?: AbortSignal | null;
}

/** A database that is waited for. */
export class MongoConnection {
	/** What there is to tell of waiting; whoever tells it takes it out. */
	readonly notices: string[] = [];
	/** When the interruption that is going on began; null: there is none. */
	private brokenSince: number | null = null;

	/** Nobody needs what is asked for any more. */
	private leaving = false;

	private constructor(
		private readonly connection: Connection,
		private readonly options: ConnectionOptions,
	) {}

	/** Connects; an address where no server answers is told at once. */
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
	 * Does `action`, again and again while the server cannot be reached. It must be such that doing it twice is doing it
	 * once. `doing` completes "while ...".
	 *
	 * @throws ArlError when an interruption lasts too long; at once for what no waiting mends.
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
					this.notices.push(`${this.address} answers again after ${seconds} s; the run continues`);
				}
				return result;
			} catch (error) {
				const failure = this.connection.fail(error, doing);
				if (!isPassing(error) || this.leaving || this.options.signal?.aborted) throw failure;
				failing ??= performance.now();
				if (performance.now() - failing > limit * 1000)
					throw waitedInVain(failure, limit, this.options.hint ?? failure.hint);
				if (this.brokenSince === null) {
					this.brokenSince = performance.now();
					this.notices.push(`${failure.message}; waiting for it, up to ${limit} s`);
				}
				await new Promise((resolve) => setTimeout(resolve, pause));
				pause = Math.min(LONGEST_PAUSE_MS, pause * 2);
			}
		}
	}

	/** From now on no request is made again. */
	giveUp(): void {
		this.leaving = true;
	}

	async close(): Promise<void> {
		await this.connection.close();
	}
}

function waitedInVain(failure: ArlError, seconds: number, hint: string): ArlError {
	return new ArlError(failure.code, `${failure.message}; gave up after ${seconds} s`, hint, {
		cause: failure.cause,
	});
}
