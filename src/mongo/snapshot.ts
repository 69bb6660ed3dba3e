/**
 * The list of a run's documents: scanned once, in the order of `_id`, and kept in the run's folder, so that a resumed run has
 * the same rows whatever the database contains by then.
 */
import { createHash, randomBytes } from "node:crypto";
import type { Document } from "mongodb";
import { type BsonValue, documentOf, driverValue, entries, numberOf } from "./bson-json.js";
import type { MongoConnection } from "./connection.js";
import { DocumentList } from "./document-list.js";
import { type ListOf, lineOf, writeList } from "./list-file.js";
import type { RowCollection, Selection } from "./selection.js";

const PAGE = 5_000;

/** A run's documents. */
export interface Snapshot extends ListOf {
	documents: DocumentList;
}

/** The id of a new list. */
export const newListId = (): string => randomBytes(8).toString("hex");

/** BSON's order of types in an index; a range of `_id` contains values of one of these groups only. */
const TYPE_ORDER = [[10], [1, 16, 18, 19], [2, 14], [3], [5], [7], [8], [9], [17], [11]];

/** What the scan reads of a document: how often it was trained, and whether it may yield more than one row. */
const PROJECTIONS: Readonly<Record<RowCollection, Document>> = {
	DBRecordData: { _id: 1, trained_count: 1 },
	Record: { _id: 1, trained_count: 1, links: { $cond: [{ $isArray: "$traj" }, { $size: "$traj" }, 0] } },
};

/** The filter for documents after this one in the order of `_id`; null: all. */
export function after(id: BsonValue | null): Document {
	if (id === null) return {};
	// `$gt` compares within one type: ids of types that come later in the order follow too.
	const later = TYPE_ORDER.slice(TYPE_ORDER.findIndex((group) => group.includes(id.type)) + 1).flat();
	const greater = { _id: { $gt: driverValue(id) } };
	return later.length === 0 ? greater : { $or: [greater, { _id: { $type: later } }] };
}

/**
 * Scans the `_id`s of a selection with one cursor; if it breaks, another one continues after the last `_id`. `several`:
 * called with the index of each document that may yield more than one row.
 */
export async function scan(
	connection: MongoConnection,
	{ collection, filter }: Selection,
	several: (index: number) => void,
): Promise<Snapshot> {
	const documents = new DocumentList();
	const options = { raw: true, projection: PROJECTIONS[collection], batchSize: PAGE };
	await connection.attempt("listing documents", async () => {
		const last = documents.length > 0 ? documents.at(documents.length - 1).id : null;
		const wanted = { $and: [filter, after(last)] };
		const cursor = connection.db.collection(collection).find(wanted, options).sort({ _id: 1 });
		try {
			let more = cursor.hasNext();
			while (await more) {
				const page = cursor.readBufferedDocuments();
				// The server assembles the next page while this one is processed.
				more = cursor.hasNext();
				more.catch(() => {});
				for (const bytes of page) {
					let id: BsonValue | undefined;
					let trainedCount = 0;
					for (const [key, value] of entries(documentOf(bytes as unknown as Uint8Array))) {
						if (key === "_id") id = value;
						else if (key === "trained_count") trainedCount = Math.max(0, numberOf(value) ?? 0);
						else if ((numberOf(value) ?? 0) > 1) several(documents.length);
					}
					if (id !== undefined) documents.push({ id, rows: 1, trainedCount });
				}
			}
		} finally {
			await cursor.close().catch(() => {});
		}
	});
	return { id: newListId(), database: connection.db.databaseName, collection, documents };
}

/** The identity of a list's rows: changes with the run and with every document of the list. */
export function listIdentity(snapshot: Snapshot): string {
	const hash = createHash("sha256").update(`${snapshot.id} ${snapshot.database} ${snapshot.collection}\n`);
	for (const part of snapshot.documents.bytes()) hash.update(part);
	return hash.digest("hex");
}

/** Writes a list into the run's folder, and removes those of earlier runs. */
export async function keepSnapshot(folder: string, snapshot: Snapshot): Promise<void> {
	const { documents } = snapshot;
	const lines = function* () {
		for (let i = 0; i < documents.length; i++) yield lineOf(documents.at(i));
	};
	await (await writeList(folder, "ids", snapshot, lines(), documents.length)).close();
}
