/**
 * Counts documents as trained once the checkpoint with their steps is complete: each document once per epoch, however often this
 * is repeated and wherever it was interrupted. A standalone server suffices: every write is an idempotent update of one document
 * at a time. Nothing is ever deleted.
 *
 * `ack` uses a ledger: `arl_acks` has a document per step. (1) The run writes it as pending; (2) counts and marks each of the
 * step's documents in one update, unless it has the mark; (3) sets the ledger's document to done; (4) removes the marks. If
 * interrupted before 3, everything is repeated, and the marks prevent counting twice; after 3, only 4 is repeated.
 *
 * `agentrl` uses none: it raises the count to that of the run's list plus the epochs since.
 */
import type { AnyBulkWriteOperation, Collection, Document } from "mongodb";
import type { StepPlan } from "../data/sampler/batches.js";
import { ArlError, toArlError } from "../errors.js";
import { driverValue } from "./bson-json.js";
import type { MongoConnection } from "./connection.js";
import type { Snapshot } from "./snapshot.js";

/** The collection of the ledger. */
const LEDGER = "arl_acks";
/** Steps that are written together. */
const STEPS_TOGETHER = 64;
/** Documents per request: their ids must fit into a document of the ledger. */
const MOST_DOCUMENTS = 20_000;

/** The documents that are counted with a step: those that the epoch has not counted before. */
interface CountedStep {
	step: number;
	/** Usually 0: only a very large step has several parts. */
	part: number;
	epoch: number;
	documents: number[];
}

/** An entry of the ledger. */
interface LedgerEntry {
	_id: string;
	run: string;
	collection: string;
	epoch: number;
	step: number;
	part: number;
	documents: unknown[];
	state: "pending" | "done";
	at: Date;
}

/** The rows of a list of documents, which may grow. */
export interface CountedRows {
	readonly connection: MongoConnection;
	readonly snapshot: Snapshot;
	readonly length: number;
	/** The document that a row comes from; null: none. */
	documentOf(row: number): number | null;
}

/** The write-back of one run. */
export class WriteBack {
	/** Steps that are written back. */
	private done = 0;
	private epoch = -1;
	/** Documents that the current epoch has counted. */
	private counted: Uint8Array;

	/** `release`: called with the documents that were counted; again if they are counted again. */
	constructor(
		private readonly rows: CountedRows,
		private readonly mode: "ack" | "agentrl",
		private readonly release: (ids: unknown[]) => Promise<void> = async () => {},
	) {
		this.counted = new Uint8Array(rows.snapshot.documents.length);
	}

	/** Checks the right to write before anything is trained. */
	async begin(): Promise<void> {
		const { connection, snapshot } = this.rows;
		const documents = connection.db.collection(snapshot.collection);
		const ask = async () => {
			await documents.updateMany({ _id: { $in: [] } }, { $set: { last_trained_step: -1 } });
			if (this.mode !== "ack") return;
			const key = { run: 1, collection: 1, step: 1, part: 1 } as const;
			await connection.db.collection(LEDGER).createIndex(key, { unique: true });
		};
		try {
			await connection.attempt("checking the right to write", ask);
		} catch (error) {
			const { code, message, hint, cause } = toArlError(error);
			if (code !== "ARL_CONFIG") throw error;
			throw new ArlError(code, message, `${hint}\nTo train and write nothing: --mongo_write_back none.`, { cause });
		}
	}

	/** Counts the steps up to `step` that are not counted yet. */
	async committed(plan: StepPlan, step: number, firstRow: number): Promise<void> {
		while (this.done < step) {
			const steps: CountedStep[] = [];
			while (this.done < step && steps.length < STEPS_TOGETHER) {
				this.done += 1;
				steps.push(...this.documentsOf(plan, this.done, firstRow));
			}
			if (steps.length === 0) continue;
			if (this.mode === "ack") await this.acknowledge(steps);
			else await this.setCounts(steps);
			await this.release(this.idsOf(steps.flatMap(({ documents }) => documents)));
		}
	}

	/** The documents that step `step` (from 1) trains for the first time in its epoch. */
	private documentsOf(plan: StepPlan, step: number, firstRow: number): CountedStep[] {
		const { epoch } = plan.place(step - 1);
		if (epoch !== this.epoch) {
			this.epoch = epoch;
			this.counted.fill(0);
		}
		const listed = this.rows.snapshot.documents.length;
		if (listed > this.counted.length) {
			const counted = new Uint8Array(listed * 2);
			counted.set(this.counted);
			this.counted = counted;
		}
		const documents: number[] = [];
		for (const batch of plan.rows(step - 1)) {
			for (const row of batch) {
				const own = row - firstRow;
				if (own < 0 || own >= this.rows.length) continue;
				const document = this.rows.documentOf(own);
				if (document === null || this.counted[document] === 1) continue;
				this.counted[document] = 1;
				documents.push(document);
			}
		}
		const parts = Array.from({ length: Math.ceil(documents.length / MOST_DOCUMENTS) }, (_, part) => part);
		return parts.map((part) => {
			return { step, part, epoch, documents: documents.slice(part * MOST_DOCUMENTS, (part + 1) * MOST_DOCUMENTS) };
		});
	}

	private idsOf(documents: number[]): unknown[] {
		return documents.map((index) => driverValue(this.rows.snapshot.documents.at(index).id));
	}

	private bulk<T extends Document>(
		collection: Collection<T>,
		operations: AnyBulkWriteOperation<T>[],
	): Promise<unknown> {
		return this.rows.connection.attempt("writing back", () => collection.bulkWrite(operations, { ordered: false }));
	}

	private async acknowledge(steps: CountedStep[]): Promise<void> {
		const { connection, snapshot } = this.rows;
		const ledger = connection.db.collection<LedgerEntry>(LEDGER);
		const documents = connection.db.collection(snapshot.collection);
		const entries = steps.map(({ step, part, epoch, documents: counted }) => {
			const id = `${snapshot.id}/${snapshot.collection}/${step}${part > 0 ? `/${part}` : ""}`;
			return { id, step, part, epoch, ids: this.idsOf(counted) };
		});
		const keys = entries.map(({ id }) => id);
		const written = await connection.attempt("writing back", () =>
			ledger.find({ _id: { $in: keys } }, { projection: { state: 1 } }).toArray(),
		);
		const finished = new Set(written.filter(({ state }) => state === "done").map(({ _id }) => _id));
		const open = entries.filter(({ id }) => !finished.has(id));
		if (open.length > 0) {
			await this.bulk(
				ledger,
				open.map(({ id, step, part, epoch, ids }) => ({
					updateOne: {
						filter: { _id: id },
						update: {
							$setOnInsert: {
								run: snapshot.id,
								collection: snapshot.collection,
								epoch: epoch + 1,
								step,
								part,
								documents: ids,
								state: "pending" as const,
								at: new Date(),
							},
						},
						upsert: true,
					},
				})),
			);
			await this.bulk(
				documents,
				open.map(({ id, step, ids }) => ({
					updateMany: {
						filter: { _id: { $in: ids }, arl_acks: { $ne: id } } as Document,
						update: {
							$inc: { trained_count: 1 },
							$set: { last_trained_step: step },
							$push: { arl_acks: id },
						} as Document,
					},
				})),
			);
			const openKeys = open.map(({ id }) => id);
			await connection.attempt("writing back", () =>
				ledger.updateMany({ _id: { $in: openKeys } }, { $set: { state: "done" } }),
			);
		}
		const ids = entries.flatMap((entry) => entry.ids);
		await connection.attempt("writing back", () =>
			documents.updateMany({ _id: { $in: ids }, arl_acks: { $in: keys } } as Document, {
				$pull: { arl_acks: { $in: keys } } as Document,
			}),
		);
		await connection.attempt("writing back", () =>
			documents.updateMany({ _id: { $in: ids }, arl_acks: [] } as Document, { $unset: { arl_acks: "" } }),
		);
	}

	private async setCounts(steps: CountedStep[]): Promise<void> {
		const { connection, snapshot } = this.rows;
		const operations = steps.flatMap(({ step, epoch, documents }) => {
			const byCount = new Map<number, number[]>();
			for (const document of documents) {
				const count = snapshot.documents.at(document).trainedCount + epoch + 1;
				const group = byCount.get(count);
				if (group) group.push(document);
				else byCount.set(count, [document]);
			}
			return [...byCount].map(([count, group]) => ({
				updateMany: {
					filter: { _id: { $in: this.idsOf(group) }, trained_count: { $not: { $gte: count } } } as Document,
					update: {
						$set: {
							trained_count: count,
							last_trained_step: step,
							...(snapshot.collection === "DBRecordData" && { fetched: true }),
						},
					},
				},
			}));
		});
		// In the order of the steps, so that a document in two of them ends with the later step.
		await connection.attempt("writing back", () =>
			connection.db.collection(snapshot.collection).bulkWrite(operations, { ordered: true }),
		);
	}
}
