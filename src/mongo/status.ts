/** Counts the documents of AgentRL's collections, and finds missing indexes. Read-only. */
import type { Document } from "mongodb";
import type { MongoConnection } from "./connection.js";
import { COLLECTIONS, type CollectionName } from "./documents.js";

/** The number of documents by value; `none`: the field is absent or null. */
export type Counts = Record<string, number>;

export interface CollectionStatus {
	documents: number;
	/** By field; fields that no document has are left out. */
	by: Partial<Record<CountedField, Counts>>;
	/** Documents that `arl train` would train on by default, by split; null: not a collection of rows. */
	trainable: Counts | null;
}

export interface MissingIndex {
	collection: CollectionName;
	key: Readonly<Record<string, 1>>;
	/** Creates it in mongosh. */
	command: string;
}

export interface DatabaseStatus {
	database: string;
	collections: Partial<Record<CollectionName, CollectionStatus>>;
	missing_indexes: MissingIndex[];
}

const FIELDS = ["_class_id", "status", "split", "trained_count", "fetched"] as const;
type CountedField = (typeof FIELDS)[number];

function add(counts: Counts, value: unknown, n: number): void {
	const name = value === undefined || value === null ? "none" : String(value);
	counts[name] = (counts[name] ?? 0) + n;
}

/** Whether documents of this group are rows that were not trained yet, which `arl train` selects by default. */
function isTrainable(name: CollectionName, { status, fetched, scored, trained_count: trained }: Document): boolean {
	if (typeof trained === "number" && trained > 0) return false;
	if (name === "Record") return status === "ready" && scored === true;
	return name === "DBRecordData" && fetched !== true;
}

async function collectionStatus(connection: MongoConnection, name: CollectionName): Promise<CollectionStatus> {
	const groups = await connection.attempt(`counting ${name}`, () =>
		connection.db
			.collection(name)
			.aggregate([
				{
					$group: {
						_id: {
							...Object.fromEntries(FIELDS.map((field) => [field, `$${field}`])),
							scored: { $gt: ["$score", null] },
						},
						n: { $sum: 1 },
					},
				},
			])
			.toArray(),
	);
	const status: CollectionStatus = { documents: 0, by: {}, trainable: null };
	const isRows = name === "Record" || name === "DBRecordData";
	if (isRows) status.trainable = {};
	for (const { _id: group, n } of groups) {
		status.documents += n;
		for (const field of FIELDS) {
			const counts = status.by[field] ?? {};
			status.by[field] = counts;
			add(counts, group[field], n);
		}
		if (status.trainable !== null && isTrainable(name, group)) add(status.trainable, group.split, n);
	}
	for (const field of FIELDS) {
		const counts = status.by[field];
		if (counts !== undefined && Object.keys(counts).every((value) => value === "none")) delete status.by[field];
	}
	return status;
}

/** Whether an index begins with the fields of `wanted`, in any order. */
function serves(key: Document, wanted: Readonly<Record<string, 1>>): boolean {
	const fields = Object.keys(wanted).filter((field) => field !== "_id");
	const first = Object.keys(key).slice(0, fields.length);
	return fields.every((field) => first.includes(field));
}

/** The status of every collection of AgentRL that exists. */
export async function databaseStatus(connection: MongoConnection): Promise<DatabaseStatus> {
	const { db } = connection;
	const there = await connection.attempt("listing the collections", () =>
		db.listCollections({}, { nameOnly: true }).toArray(),
	);
	const names = new Set(there.map(({ name }) => name));
	const status: DatabaseStatus = { database: connection.address, collections: {}, missing_indexes: [] };
	for (const [name, { index }] of Object.entries(COLLECTIONS) as [CollectionName, (typeof COLLECTIONS)["Task"]][]) {
		if (!names.has(name)) continue;
		status.collections[name] = await collectionStatus(connection, name);
		if (index === null) continue;
		const indexes = await connection.attempt(`reading the indexes of ${name}`, () => db.collection(name).indexes());
		if (indexes.some(({ key }) => serves(key, index))) continue;
		const shown = Object.keys(index).map((field) => `${field}: 1`);
		status.missing_indexes.push({
			collection: name,
			key: index,
			command: `db.${name}.createIndex({ ${shown.join(", ")} })`,
		});
	}
	return status;
}
