/**
 * Trains rows of a database as they arrive: the run leases them in small groups, reads and logs them, and counts and releases
 * them once a checkpoint is complete. A heartbeat extends the leases for as long as the run lives.
 */
import { setTimeout as pause } from "node:timers/promises";
import type { AgentTrainingConfig } from "../config/schema.js";
import type { StepPlan } from "../data/sampler/batches.js";
import type { MadeRow } from "../data/sources/convert.js";
import { rowsInOrder } from "../data/sources/source.js";
import { ArlError, toArlError } from "../errors.js";
import { type BsonValue, driverValue, valueKey } from "./bson-json.js";
import { MongoConnection } from "./connection.js";
import { checkSameList, RESUME_HINT, type ResumedList } from "./database.js";
import { DocumentList, type Listed } from "./document-list.js";
import { LeaseLog } from "./lease-log.js";
import { Leases } from "./leases.js";
import { listsIn } from "./list-file.js";
import { selectionWithRows } from "./selection.js";
import { newListId, type Snapshot } from "./snapshot.js";
import { DatabaseRows } from "./source.js";
import { WriteBack } from "./write-back.js";

/** How long a lease lasts without being extended. */
const LEASE_SECONDS = 120;
/** The most documents that are leased, and read, together. */
const TOGETHER = 256;
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 2_000;
/** A wait of this length is reported. */
const REPORT_AFTER_MS = 30_000;

export interface FollowOptions {
	args: AgentTrainingConfig;
	uri: string;
	/** Null: a new run. */
	resumed: ResumedList | null;
	/** Steps of the checkpoint that the run resumes from. */
	step: number;
	samplesOfStep: number;
	signal: AbortSignal | null;
}

/** A run that follows a database. */
export class FollowRun {
	/** First row of this part of the run. */
	readonly firstRow: number;
	/** Documents before this one belong to steps of a complete checkpoint. */
	private heldFrom: number;
	/** Documents before this one are also counted as trained. */
	private countedFrom: number;
	private writing: Promise<void> = Promise.resolve();
	private leasing: Promise<unknown> = Promise.resolve();
	private beating: Promise<void> = Promise.resolve();
	private timer: NodeJS.Timeout | undefined;
	private failure: unknown = null;
	/** When all leases were last extended. */
	private extendedAt = performance.now();
	private readonly ending = new AbortController();
	private readonly writeBack: WriteBack;

	private constructor(
		private readonly options: FollowOptions,
		private readonly connection: MongoConnection,
		private readonly leases: Leases,
		private readonly log: LeaseLog,
		private readonly leaseMs: number,
	) {
		const { args, step, samplesOfStep } = options;
		this.firstRow = step * samplesOfStep;
		this.heldFrom = log.firstFrom(Math.max(step, log.counted) * samplesOfStep);
		this.countedFrom = log.firstFrom(log.counted * samplesOfStep);
		const mode = args.mongo_write_back === "agentrl" ? "agentrl" : "ack";
		const rows = {
			connection,
			snapshot: log,
			get length() {
				return log.rows;
			},
			documentOf: (row: number) => {
				const document = log.documentOf(row);
				return log.isDocument(document) ? document : null;
			},
		};
		this.writeBack = new WriteBack(rows, mode, (ids) => leases.release(ids));
	}

	static async open(options: FollowOptions): Promise<FollowRun> {
		const { args, uri, resumed, signal } = options;
		const connection = await MongoConnection.open(uri, { signal, hint: RESUME_HINT });
		try {
			const old = resumed && (await LeaseLog.read(resumed.folders, resumed.id));
			if (old) checkSameList(connection, args, old);
			const selection = await selectionWithRows(connection, { ...args, db_source: old?.collection ?? args.db_source });
			const id = old?.id ?? newListId();
			const leaseMs = leaseSeconds() * 1000;
			const leases = new Leases(connection, selection, id, leaseMs);
			await leases.readClock();
			// The folder is locked: a run that left its log here before its first checkpoint will not resume.
			if (!old) for (const gone of await listsIn(args.output_dir, "claims")) await leases.releaseOf(gone);
			const log = old
				? await resumeLog(old, leases, options, (message) => connection.notices.push(message))
				: new LeaseLog(id, connection.db.databaseName, selection.collection);
			const run = new FollowRun(options, connection, leases, log, leaseMs);
			await run.writeBack.begin();
			run.beat();
			return run;
		} catch (error) {
			await connection.close().catch(() => {});
			throw error;
		}
	}

	/** The id of the log, which a checkpoint must record. */
	get id(): string {
		return this.log.id;
	}

	/** For people: address and collection. */
	get name(): string {
		return `${this.connection.address}.${this.log.collection}`;
	}

	/** Rows in the order of the leases: first those that an earlier part of the run had leased and not trained. */
	async *rows(): AsyncGenerator<MadeRow> {
		const { log, firstRow } = this;
		const known = log.documents.length;
		const first = firstRow < log.rows ? log.documentOf(firstRow) : known;
		let skip = first < known ? firstRow - log.firstRow(first) : 0;
		for (let at = first; at < known; at += TOGETHER) {
			for await (const row of this.read(at, Math.min(known, at + TOGETHER))) {
				if (skip > 0) skip -= 1;
				else yield row;
			}
		}
		const limit = (this.options.args.follow_idle ?? Number.POSITIVE_INFINITY) * 1000;
		let idle = 0;
		let wait = FIRST_PAUSE_MS;
		while (!this.ending.signal.aborted) {
			const from = log.documents.length;
			await this.lease(idle >= limit);
			if (log.documents.length > from) {
				[idle, wait] = [0, FIRST_PAUSE_MS];
				yield* this.read(from, log.documents.length);
				continue;
			}
			if (idle >= limit) break;
			wait = Math.min(wait, limit - idle);
			await pause(wait, undefined, { signal: this.ending.signal, ref: false }).catch(() => {});
			if (idle < REPORT_AFTER_MS && idle + wait >= REPORT_AFTER_MS) {
				this.connection.notices.push(`no new row has come for ${REPORT_AFTER_MS / 1000} s; waiting for more`);
			}
			idle += wait;
			wait = Math.min(LONGEST_PAUSE_MS, wait * 2);
		}
		if (log.rows > firstRow || this.ending.signal.aborted) return;
		throw new ArlError(
			"ARL_DATA",
			`${this.name}: no row has come within ${limit / 1000} s (follow_idle)`,
			"`arl mongo status` shows the documents; --split, --db_source and --db_match choose rows among them.",
		);
	}

	private async lease(all: boolean): Promise<void> {
		if (this.failure !== null) throw this.failure;
		const leasing = this.leaseSome(all);
		this.leasing = leasing.catch(() => {});
		await leasing;
	}

	private async leaseSome(all: boolean): Promise<void> {
		const { args, samplesOfStep } = this.options;
		const needed = args.max_steps * samplesOfStep - this.log.rows;
		const taken = await this.leases.take(Math.min(TOGETHER, samplesOfStep, needed), all);
		const counts = this.log.collection === "Record" ? await this.rowsOf(taken) : [];
		for (const [i, listed] of taken.entries()) this.log.push({ ...listed, rows: counts[i] ?? 1 });
	}

	/** How many rows each of these yields. */
	private rowsOf(listed: Listed[]): Promise<number[]> {
		const reader = new DatabaseRows(this.connection, this.part(listed), null);
		return reader.countRows(listed.map((_, i) => i));
	}

	private part(listed: Iterable<Listed>): Snapshot {
		const documents = new DocumentList();
		for (const one of listed) documents.push(one);
		const { id, database, collection } = this.log;
		return { id, database, collection, documents };
	}

	/** The rows of documents [from, to). */
	private async *read(from: number, to: number): AsyncGenerator<MadeRow> {
		const listed = Array.from({ length: to - from }, (_, i) => this.log.documents.at(from + i));
		const rows = new DatabaseRows(this.connection, this.part(listed), null);
		for await (const { row, content } of rowsInOrder(rows)) yield { row: content, location: rows.location(row) };
	}

	private idsFrom(document: number): BsonValue[] {
		const { documents } = this.log;
		const ids: BsonValue[] = [];
		for (let i = document; i < documents.length; i++) if (this.log.isDocument(i)) ids.push(documents.at(i).id);
		return ids;
	}

	/** Schedules the next heartbeat. */
	private beat(): void {
		if (this.ending.signal.aborted) return;
		this.timer = setTimeout(() => {
			this.beating = this.extend().then(
				() => this.beat(),
				(error: unknown) => {
					this.failure ??= error;
				},
			);
		}, this.leaseMs / 3);
		this.timer.unref();
	}

	/** Extends all leases. Throws `ARL_STATE` if a lease was lost: another run may have trained the row by now. */
	private async extend(): Promise<void> {
		const started = performance.now();
		const lost = await this.leases.extend(this.idsFrom(this.countedFrom));
		if (lost.size === 0) this.extendedAt = started;
		if (lost.size === 0 || this.ending.signal.aborted) return;
		// Rows that have been counted meanwhile were released.
		const gone = this.idsFrom(this.heldFrom).filter((id) => lost.has(valueKey(id)));
		if (gone.length === 0) return;
		throw new ArlError(
			"ARL_STATE",
			`${this.name}: this run has lost its leases of ${gone.length} rows: it was out of touch for more than ${this.leaseMs / 1000} s, or they were deleted`,
			"Resume with --resume_from_checkpoint latest: the last checkpoint has trained none of them, and they are left out.",
		);
	}

	/** Before a checkpoint is written: makes sure that the run still has the leases of its rows. */
	async beforeSave(): Promise<void> {
		if (this.failure !== null) throw this.failure;
		try {
			await this.extend();
		} catch (error) {
			// While the server is unreachable, the run may still save rows whose leases cannot have expired yet.
			const isOurs = performance.now() - this.extendedAt < this.leaseMs;
			if (!isOurs || toArlError(error).code !== "ARL_IO") throw error;
		}
	}

	/** Before the first step. */
	begin(): Promise<void> {
		return this.log.begin(this.options.args.output_dir);
	}

	/** Forces the log to disk, so that it survives a crash of the machine. */
	sync(): void {
		this.log.sync();
	}

	/** After a checkpoint of `step` steps is complete: counts and releases its rows, concurrently with training. */
	afterSave(plan: StepPlan, step: number): void {
		const { log } = this;
		const until = log.firstFrom(step * this.options.samplesOfStep);
		this.heldFrom = Math.max(this.heldFrom, until);
		this.writing = this.writing.then(async () => {
			await this.writeBack.committed(plan, step, 0);
			log.noteCounted(step);
			this.countedFrom = Math.max(this.countedFrom, until);
		});
		// `flush` reports an error; until then it must not count as unhandled.
		this.writing.catch(() => {});
	}

	/** Waits until everything is written. */
	flush(): Promise<void> {
		return this.writing;
	}

	notices(): string[] {
		return this.connection.notices.splice(0);
	}

	/** Ends the run: finishes writing, and releases rows that no checkpoint has trained. */
	async end(): Promise<void> {
		if (this.ending.signal.aborted) return;
		this.ending.abort();
		clearTimeout(this.timer);
		await this.writing.catch(() => {});
		// If the server is unreachable, the leases will expire.
		this.connection.giveUp();
		await Promise.all([this.leasing, this.beating]);
		await this.leases.release(this.idsFrom(this.heldFrom).map(driverValue)).catch(() => {});
	}

	async close(): Promise<void> {
		await this.end();
		await this.log.close();
		await this.connection.close();
	}
}

/** Tests cannot wait two minutes for leases to expire. */
function leaseSeconds(): number {
	const given = Number(process.env.ARL_TEST_FOLLOW_LEASE);
	return given > 0 ? given : LEASE_SECONDS;
}

/**
 * The log of a resumed run: trained rows keep their places; rows that were only leased follow in the same order, if this run
 * still has or gets their leases.
 */
async function resumeLog(
	old: LeaseLog,
	leases: Leases,
	{ step, samplesOfStep }: FollowOptions,
	report: (message: string) => void,
): Promise<LeaseLog> {
	const trained = step * samplesOfStep;
	const log = new LeaseLog(old.id, old.database, old.collection);
	log.counted = old.counted;
	const { documents } = old;
	const certain = old.firstFrom(Math.max(step, old.counted) * samplesOfStep);
	for (let i = 0; i < certain; i++) log.push(documents.at(i));
	if (log.rows < trained) log.pushNone(trained - log.rows);
	const pending = Array.from({ length: documents.length - certain }, (_, i) => documents.at(certain + i));
	const got = await leases.takeAgain(pending.map(({ id }) => id));
	const isOurs = ({ id }: Listed) => got.has(valueKey(id));
	for (const listed of pending.filter(isOurs)) log.push(listed);
	const lost = pending.length - got.size;
	if (lost > 0) {
		report(`${lost} rows that this run had leased and not trained went to another run or are gone; they are left out`);
	}
	const logged = Array.from({ length: log.documents.length }, (_, i) => valueKey(log.documents.at(i).id));
	await leases.releaseAllBut(new Set(logged));
	return log;
}
