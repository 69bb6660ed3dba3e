/**
 * Rows of a database that are trained as they arrive: claimed for this run in small groups, read, noted in the run's list, and
 * counted and let go when a checkpoint stands. What is claimed is extended by a heartbeat for as long as the run lives.
 */
import { setTimeout as pause } from "node:timers/promises";
import type { AgentTrainingConfig } from "../config/schema.js";
import type { StepPlan } from "../data/sampler/batches.js";
import type { MadeRow } from "../data/sources/convert.js";
import { takeRows } from "../data/sources/source.js";
import { ArlError, toArlError } from "../errors.js";
import { type BsonValue, driverValue, valueKey } from "./bson-json.js";
import { ClaimList, claimListsIn, readClaimList } from "./claim-list.js";
import { Claims } from "./claims.js";
import { MongoConnection } from "./connection.js";
import { checkSameList, GO_ON, type ResumedList } from "./database.js";
import { selectionWithRows } from "./selection.js";
import { DocumentList, type Listed, newListId, type Snapshot } from "./snapshot.js";
import { DatabaseRows } from "./source.js";
import { WriteBack } from "./write-back.js";

/** How long a run that says nothing keeps its claims. */
const LEASE_SECONDS = 120;
/** Documents that are claimed, and read, together at the most. */
const TOGETHER = 256;
const READ_BYTES = 8 * 1024 * 1024;
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 2_000;
/** A wait of this length is told. */
const TOLD_AFTER_MS = 30_000;

export interface FollowOptions {
	args: AgentTrainingConfig;
	uri: string;
	/** Null: a new list is begun. */
	resumed: ResumedList | null;
	/** Steps of the checkpoint that the run goes on from. */
	step: number;
	samplesOfStep: number;
	signal: AbortSignal | null;
}

/** One run that follows a database. */
export class FollowRun {
	/** First row of this part of the run. */
	readonly firstRow: number;
	/** Documents before this one are trained by steps of which a checkpoint stands. */
	private heldFrom: number;
	/** Documents before this one are counted as trained too. */
	private countedFrom: number;
	private writing: Promise<void> = Promise.resolve();
	private claiming: Promise<unknown> = Promise.resolve();
	private beating: Promise<void> = Promise.resolve();
	private timer: NodeJS.Timeout | undefined;
	private failure: unknown = null;
	/** When all that was held then was extended last. */
	private extendedAt = performance.now();
	private readonly ending = new AbortController();
	private readonly writeBack: WriteBack;

	private constructor(
		private readonly options: FollowOptions,
		private readonly connection: MongoConnection,
		private readonly claims: Claims,
		private readonly list: ClaimList,
		private readonly leaseMs: number,
	) {
		const { args, step, samplesOfStep } = options;
		this.firstRow = step * samplesOfStep;
		this.heldFrom = list.firstFrom(Math.max(step, list.counted) * samplesOfStep);
		this.countedFrom = list.firstFrom(list.counted * samplesOfStep);
		const mode = args.mongo_write_back === "agentrl" ? "agentrl" : "ack";
		const rows = {
			connection,
			snapshot: list,
			get length() {
				return list.rows;
			},
			documentOf: (row: number) => {
				const document = list.documentOf(row);
				return list.isThere(document) ? document : null;
			},
		};
		this.writeBack = new WriteBack(rows, mode, (ids) => claims.release(ids));
	}

	static async open(options: FollowOptions): Promise<FollowRun> {
		const { args, uri, resumed, signal } = options;
		const connection = await MongoConnection.open(uri, { signal, hint: GO_ON });
		try {
			const old = resumed && (await readClaimList(resumed.folders, resumed.id));
			if (old) checkSameList(connection, args, old);
			const selection = await selectionWithRows(connection, { ...args, db_source: old?.collection ?? args.db_source });
			const id = old?.id ?? newListId();
			const leaseMs = leaseSeconds() * 1000;
			const claims = new Claims(connection, selection, id, leaseMs);
			await claims.readClock();
			// Nobody else works in this folder: a run that left its list there before a checkpoint stood will not go on.
			if (!old) for (const gone of await claimListsIn(args.output_dir)) await claims.releaseOf(gone);
			const list = old
				? await goOn(old, claims, options, (message) => connection.notices.push(message))
				: new ClaimList(id, connection.db.databaseName, selection.collection);
			const run = new FollowRun(options, connection, claims, list, leaseMs);
			await run.writeBack.begin();
			run.beat();
			return run;
		} catch (error) {
			await connection.close().catch(() => {});
			throw error;
		}
	}

	/** Of the list: what a checkpoint must keep. */
	get id(): string {
		return this.list.id;
	}

	/** For people: address and collection. */
	get name(): string {
		return `${this.connection.address}.${this.list.collection}`;
	}

	/** Rows in the order of the claims, those first that an earlier part of the run had claimed and not trained. */
	async *rows(): AsyncGenerator<MadeRow> {
		const { list, firstRow } = this;
		const known = list.documents.length;
		const first = firstRow < list.rows ? list.documentOf(firstRow) : known;
		let skip = first < known ? firstRow - list.firstRow(first) : 0;
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
			const from = list.documents.length;
			await this.claim(idle >= limit);
			if (list.documents.length > from) {
				[idle, wait] = [0, FIRST_PAUSE_MS];
				yield* this.read(from, list.documents.length);
				continue;
			}
			if (idle >= limit) break;
			wait = Math.min(wait, limit - idle);
			await pause(wait, undefined, { signal: this.ending.signal, ref: false }).catch(() => {});
			if (idle < TOLD_AFTER_MS && idle + wait >= TOLD_AFTER_MS) {
				this.connection.notices.push(`no new row has come for ${TOLD_AFTER_MS / 1000} s; waiting for more`);
			}
			idle += wait;
			wait = Math.min(LONGEST_PAUSE_MS, wait * 2);
		}
		if (list.rows > firstRow || this.ending.signal.aborted) return;
		throw new ArlError(
			"ARL_DATA",
			`${this.name}: no row has come within ${limit / 1000} s (follow_idle)`,
			"`arl mongo status` shows what is there; rows are chosen by --split, --db_source and --db_match.",
		);
	}

	private async claim(all: boolean): Promise<void> {
		if (this.failure !== null) throw this.failure;
		const claiming = this.claimSome(all);
		this.claiming = claiming.catch(() => {});
		await claiming;
	}

	private async claimSome(all: boolean): Promise<void> {
		const { args, samplesOfStep } = this.options;
		const needed = args.max_steps * samplesOfStep - this.list.rows;
		const taken = await this.claims.take(Math.min(TOGETHER, samplesOfStep, needed), all);
		const counts = this.list.collection === "Record" ? await this.rowsOf(taken) : [];
		for (const [i, listed] of taken.entries()) this.list.push({ ...listed, rows: counts[i] ?? 1 });
	}

	/** How many rows each of these gives. */
	private rowsOf(listed: Listed[]): Promise<number[]> {
		const reader = new DatabaseRows(this.connection, this.part(listed), null);
		return reader.countRows(listed.map((_, i) => i));
	}

	private part(listed: Iterable<Listed>): Snapshot {
		const documents = new DocumentList();
		for (const one of listed) documents.push(one);
		const { id, database, collection } = this.list;
		return { id, database, collection, documents };
	}

	/** The rows of documents [from, to). */
	private async *read(from: number, to: number): AsyncGenerator<MadeRow> {
		const listed = Array.from({ length: to - from }, (_, i) => this.list.documents.at(from + i));
		const rows = new DatabaseRows(this.connection, this.part(listed), null);
		const indexes = Uint32Array.from({ length: rows.length }, (_, i) => i);
		for (let done = 0; done < rows.length; ) {
			for (const row of await takeRows(rows, indexes.subarray(done), READ_BYTES)) {
				yield { row, location: rows.location(done) };
				done += 1;
			}
		}
	}

	private idsFrom(document: number): BsonValue[] {
		const { documents } = this.list;
		const ids: BsonValue[] = [];
		for (let i = document; i < documents.length; i++) if (this.list.isThere(i)) ids.push(documents.at(i).id);
		return ids;
	}

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

	/** Extends all leases. Throws `ARL_STATE` where a claim was lost: another run may train the row by now. */
	private async extend(): Promise<void> {
		const started = performance.now();
		const lost = await this.claims.extend(this.idsFrom(this.countedFrom));
		if (lost.size === 0) this.extendedAt = started;
		if (lost.size === 0 || this.ending.signal.aborted) return;
		// What has been counted meanwhile was let go.
		const gone = this.idsFrom(this.heldFrom).filter((id) => lost.has(valueKey(id)));
		if (gone.length === 0) return;
		throw new ArlError(
			"ARL_STATE",
			`${this.name}: ${gone.length} rows that this run had claimed are no longer its own: it was out of touch for more than ${this.leaseMs / 1000} s, or they were deleted`,
			"Go on with --resume_from_checkpoint latest: the last checkpoint holds none of them, and they are left out.",
		);
	}

	/** A checkpoint is about to be written: its rows are this run's for certain, and will be until they are counted. */
	async beforeSave(): Promise<void> {
		if (this.failure !== null) throw this.failure;
		try {
			await this.extend();
		} catch (error) {
			// Whoever is interrupted while the server is away may save what nobody can have taken yet.
			const isOurs = performance.now() - this.extendedAt < this.leaseMs;
			if (!isOurs || toArlError(error).code !== "ARL_IO") throw error;
		}
	}

	/** The first step is about to come. */
	begin(): Promise<void> {
		return this.list.begin(this.options.args.output_dir);
	}

	/** The list is on the disk from here on, also if the machine stops. */
	sync(): void {
		this.list.sync();
	}

	/** A checkpoint after `step` steps stands: its rows are counted and let go, beside training. */
	afterSave(plan: StepPlan, step: number): void {
		const { list } = this;
		const until = list.firstFrom(step * this.options.samplesOfStep);
		this.heldFrom = Math.max(this.heldFrom, until);
		this.writing = this.writing.then(async () => {
			await this.writeBack.committed(plan, step, 0);
			list.noteCounted(step);
			this.countedFrom = Math.max(this.countedFrom, until);
		});
		// Whoever waits for it hears of a failure; until then it must not count as unhandled.
		this.writing.catch(() => {});
	}

	/** All that was to be written is. */
	flush(): Promise<void> {
		return this.writing;
	}

	notices(): string[] {
		return this.connection.notices.splice(0);
	}

	/** The run is over: what is being written is waited for, and claims of rows that no checkpoint holds are given back. */
	async end(): Promise<void> {
		if (this.ending.signal.aborted) return;
		this.ending.abort();
		clearTimeout(this.timer);
		await this.writing.catch(() => {});
		// A server that is gone is waited for no more; its leases run out.
		this.connection.giveUp();
		await Promise.all([this.claiming, this.beating]);
		await this.claims.release(this.idsFrom(this.heldFrom).map(driverValue)).catch(() => {});
	}

	async close(): Promise<void> {
		await this.end();
		this.list.close();
		await this.connection.close();
	}
}

/** Tests have no two minutes to wait for a run that is gone. */
function leaseSeconds(): number {
	const given = Number(process.env.ARL_TEST_FOLLOW_LEASE);
	return given > 0 ? given : LEASE_SECONDS;
}

/**
 * The list of a run that goes on: what is trained stays in its place; what was only claimed comes again in the same order, as far
 * as it is or can be this run's again.
 */
async function goOn(
	old: ClaimList,
	claims: Claims,
	{ step, samplesOfStep }: FollowOptions,
	tell: (message: string) => void,
): Promise<ClaimList> {
	const trained = step * samplesOfStep;
	const list = new ClaimList(old.id, old.database, old.collection);
	list.counted = old.counted;
	const { documents } = old;
	const certain = old.firstFrom(Math.max(step, old.counted) * samplesOfStep);
	for (let i = 0; i < certain; i++) list.push(documents.at(i));
	if (list.rows < trained) list.pushNone(trained - list.rows);
	const pending = Array.from({ length: documents.length - certain }, (_, i) => documents.at(certain + i));
	const got = await claims.takeAgain(pending.map(({ id }) => id));
	const isOurs = ({ id }: Listed) => got.has(valueKey(id));
	for (const listed of pending.filter(isOurs)) list.push(listed);
	const lost = pending.length - got.size;
	if (lost > 0) {
		tell(`${lost} rows that this run had claimed and not trained went to another run or are gone; they are left out`);
	}
	const noted = Array.from({ length: list.documents.length }, (_, i) => valueKey(list.documents.at(i).id));
	await claims.releaseAllBut(new Set(noted));
	return list;
}
