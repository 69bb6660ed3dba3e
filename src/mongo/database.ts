/**
 * Rows of a database for one run: from the options to a source, with the list of documents in the run's folder and the write-back
 * after each checkpoint.
 */
import type { AgentTrainingConfig } from "../config/schema.js";
import type { StepPlan } from "../data/sampler/batches.js";
import type { ConvertRecordToData } from "../data/sources/convert.js";
import { ArlError } from "../errors.js";
import { MongoConnection } from "./connection.js";
import { type ListOf, readList } from "./list-file.js";
import { ambiguous, nothingFound, type SelectionOptions, selections } from "./selection.js";
import { keepSnapshot, type Snapshot, scan } from "./snapshot.js";
import { DatabaseRows } from "./source.js";
import { WriteBack } from "./write-back.js";

/** How a resumed run finds its list of documents. */
export interface ResumedList {
	/** The list's id, from the checkpoint. */
	id: string;
	/** Folders that it may be in. */
	folders: string[];
}

export interface DatabaseOptions {
	args: AgentTrainingConfig;
	uri: string;
	/** Null: a new list is scanned. */
	resumed: ResumedList | null;
	convert: ConvertRecordToData | null;
	signal: AbortSignal | null;
}

const COUNT_TOGETHER = 256;
/** What to do once an unreachable server is back. */
export const RESUME_HINT =
	"The last checkpoint has what was trained. Once the server is back, resume with --resume_from_checkpoint latest.";

/**
 * The rows of a selection as they are now. `convert`: a user's function from a record to rows. The caller closes the
 * connection.
 *
 * @throws ArlError `ARL_DATA` if there are none, `ARL_CONFIG` if both collections have some and none was chosen.
 */
export async function openDatabaseRows(
	connection: MongoConnection,
	options: SelectionOptions,
	convert: ConvertRecordToData | null = null,
): Promise<DatabaseRows> {
	return new DatabaseRows(connection, await newSnapshot(connection, options, convert), convert);
}

/** Rows of a database in a run: keeps the list of its documents, and writes back what was trained. */
export class DatabaseRun {
	/** Writes concurrently with training, one after the other: the list, then the counts of each checkpoint. */
	private writing: Promise<void> = Promise.resolve();
	private kept: Promise<void> = Promise.resolve();

	private constructor(
		readonly rows: DatabaseRows,
		private readonly writeBack: WriteBack | null,
		private readonly outputDir: string,
		private readonly interval: number,
	) {}

	static async open({ args, uri, resumed, convert, signal }: DatabaseOptions): Promise<DatabaseRun> {
		const connection = await MongoConnection.open(uri, { signal, hint: RESUME_HINT });
		try {
			const rows =
				resumed === null
					? await openDatabaseRows(connection, args, convert)
					: new DatabaseRows(connection, await oldSnapshot(connection, args, resumed), convert);
			const mode = args.mongo_write_back;
			const writeBack = mode === "none" ? null : new WriteBack(rows, mode);
			await writeBack?.begin();
			return new DatabaseRun(rows, writeBack, args.output_dir, args.retrained_interval);
		} catch (error) {
			await connection.close().catch(() => {});
			throw error;
		}
	}

	/** The id of the list, which a checkpoint must record. */
	get id(): string {
		return this.rows.snapshot.id;
	}

	/** Notices since the last call. */
	notices(): string[] {
		return this.rows.connection.notices.splice(0);
	}

	/** Before the first step: writes the list, concurrently with it. */
	begin(): void {
		this.kept = keepSnapshot(this.outputDir, this.rows.snapshot);
		this.queue(() => this.kept);
	}

	/** Before a checkpoint is written: waits for the list, which resuming needs. */
	beforeSave(): Promise<void> {
		return this.kept;
	}

	private queue(write: () => Promise<void>): void {
		this.writing = this.writing.then(write);
		// `flush` reports an error; until then it must not count as unhandled.
		this.writing.catch(() => {});
	}

	/**
	 * Throws `ARL_CONFIG` if the steps would train a row again sooner than `retrained_interval` allows. The scan has checked what
	 * was trained before the run.
	 */
	check(plan: StepPlan, firstRow: number): void {
		if (this.interval === 1) return;
		const last = new Int32Array(this.rows.length).fill(-this.interval);
		for (let step = 0; step < plan.totalSteps; step++) {
			for (const row of plan.rows(step).flatMap((batch) => [...batch])) {
				const own = row - firstRow;
				if (own < 0 || own >= last.length) continue;
				const apart = step - (last[own] as number);
				if (apart < this.interval) {
					throw new ArlError(
						"ARL_CONFIG",
						`retrained_interval ${this.interval}: ${this.rows.location(own)} would be trained in step ${step + 1 - apart} and again in step ${step + 1}`,
						"Lower retrained_interval, train one epoch only, or keep the order of the rows with --train_sampling_strategy sequential.",
					);
				}
				last[own] = step;
			}
		}
	}

	/**
	 * After a checkpoint of `step` steps is complete: counts the rows of these steps as trained, concurrently with training.
	 * `firstRow`: of this source within the rows of the run. Repeating it changes nothing.
	 */
	afterSave(plan: StepPlan, step: number, firstRow: number): void {
		const { writeBack } = this;
		if (writeBack === null) return;
		this.queue(() => writeBack.committed(plan, step, firstRow));
	}

	/** Ends the run: finishes writing, and no longer waits for an unreachable server. */
	async end(): Promise<void> {
		await this.writing.catch(() => {});
		this.rows.connection.giveUp();
	}

	/** Waits until everything is written. Rejects if that failed. */
	flush(): Promise<void> {
		return this.writing;
	}
}

async function newSnapshot(
	connection: MongoConnection,
	options: SelectionOptions,
	convert: ConvertRecordToData | null,
): Promise<Snapshot> {
	const lists: { snapshot: Snapshot; several: number[] }[] = [];
	for (const selection of await selections(connection, options)) {
		const several: number[] = [];
		const snapshot = await scan(connection, selection, (index) => several.push(index));
		if (snapshot.documents.length > 0) lists.push({ snapshot, several });
	}
	const [first, second] = lists;
	if (first === undefined) throw await nothingFound(connection, options);
	if (second !== undefined) {
		const counts = lists.map(({ snapshot: { collection, documents } }) => ({ collection, rows: documents.length }));
		throw ambiguous(connection, counts);
	}
	const { snapshot, several } = first;
	// A record with several samples, or with a user's function, must be converted to know how many rows it yields.
	const counted = convert === null ? several : Array.from({ length: snapshot.documents.length }, (_, index) => index);
	if (snapshot.collection !== "Record") return snapshot;
	const reader = new DatabaseRows(connection, snapshot, convert);
	let without = 0;
	for (let at = 0; at < counted.length; at += COUNT_TOGETHER) {
		const part = counted.slice(at, at + COUNT_TOGETHER);
		for (const [i, rows] of (await reader.countRows(part)).entries()) {
			snapshot.documents.setRows(part[i] as number, rows);
			if (rows === 0) without += 1;
		}
	}
	if (without > 0) connection.notices.push(`convert_record_to_data_func returns no row for ${without} records`);
	return snapshot;
}

async function oldSnapshot(
	connection: MongoConnection,
	args: AgentTrainingConfig,
	{ id, folders }: ResumedList,
): Promise<Snapshot> {
	const snapshot = await readList(folders, "ids", id);
	checkSameList(connection, args, snapshot);
	return snapshot;
}

/** Throws `ARL_STATE` if a run would resume with rows from another place. */
export function checkSameList(connection: MongoConnection, args: AgentTrainingConfig, snapshot: ListOf): void {
	const changed: string[] = [];
	if (snapshot.database !== connection.db.databaseName) {
		changed.push(`database: ${snapshot.database} -> ${connection.db.databaseName}`);
	}
	if (args.db_source !== "auto" && args.db_source !== snapshot.collection) {
		changed.push(`db_source: ${snapshot.collection} -> ${args.db_source}`);
	}
	if (changed.length === 0) return;
	throw new ArlError(
		"ARL_STATE",
		["this run's rows came from another place:", ...changed].join("\n"),
		"Resume with the same database, or start from scratch with another output_dir and the checkpoint as model_name_or_path.",
	);
}
