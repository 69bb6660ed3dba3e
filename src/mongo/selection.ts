/**
 * Selects the documents of a database that are rows of a run: the collection, the filter, and the error if nothing matches.
 */
import { BSON, type Document } from "mongodb";
import type { AgentTrainingConfig } from "../config/schema.js";
import { ArlError, toArlError } from "../errors.js";
import type { MongoConnection } from "./connection.js";

/** The collections of rows. */
const ROW_COLLECTIONS = ["Record", "DBRecordData"] as const;
export type RowCollection = (typeof ROW_COLLECTIONS)[number];

export type SelectionOptions = Pick<AgentTrainingConfig, "db_source" | "db_match" | "split" | "retrained_interval"> & {
	/** Null: no limit. */
	max_trained_count: number | null;
};

/** The documents that a run trains on. */
export interface Selection {
	collection: RowCollection;
	filter: Document;
}

/** A condition of the filter, with the option that it comes from. */
interface Condition {
	name: string;
	filter: Document;
}

/** The user's condition in Extended JSON, which has ids and dates. */
function matchOf(match: SelectionOptions["db_match"]): Condition[] {
	if (Object.keys(match).length === 0) return [];
	try {
		return [{ name: "db_match", filter: BSON.EJSON.deserialize(match) as Document }];
	} catch (error) {
		throw new ArlError(
			"ARL_CONFIG",
			`db_match: ${toArlError(error).message}`,
			'Write it as Extended JSON, for example \'{"_id": {"$gt": {"$oid": "64f000000000000000000000"}}}\'.',
		);
	}
}

function conditionsOf(collection: RowCollection, options: SelectionOptions, lastStep: number): Condition[] {
	const split = options.split;
	const most = options.max_trained_count;
	const interval = options.retrained_interval;
	const conditions: Condition[] =
		collection === "Record"
			? [
					{ name: "status ready", filter: { status: "ready" } },
					{ name: "a score", filter: { score: { $ne: null } } },
				]
			: [{ name: "fetched false", filter: { fetched: { $ne: true } } }];
	// `$not` also matches documents without the field, which were never trained.
	if (most !== null) {
		conditions.push({ name: `trained_count < ${most}`, filter: { trained_count: { $not: { $gte: most } } } });
	}
	if (interval > 1) {
		const trained = {
			$or: [{ last_trained_step: { $in: [null, -1] } }, { last_trained_step: { $lte: lastStep + 1 - interval } }],
		};
		conditions.push({ name: `retrained_interval ${interval}`, filter: trained });
	}
	if (split !== null) {
		const wanted = split === "train" ? { $in: ["train", null] } : split;
		conditions.push({ name: `split ${split}`, filter: { split: wanted } });
	}
	return [...conditions, ...matchOf(options.db_match)];
}

const all = (conditions: Condition[]): Document => ({ $and: conditions.map(({ filter }) => filter) });

/** The last step in which any document of the collection was trained; -1: none. */
async function lastTrainedStep(connection: MongoConnection, collection: RowCollection): Promise<number> {
	const [found] = await connection.attempt("counting documents", () =>
		connection.db
			.collection(collection)
			.find({ last_trained_step: { $gt: -1 } }, { projection: { last_trained_step: 1 } })
			.sort({ last_trained_step: -1 })
			.limit(1)
			.toArray(),
	);
	return Number(found?.last_trained_step ?? -1);
}

/** The collections that may have rows, each with its filter. */
export async function selections(connection: MongoConnection, options: SelectionOptions): Promise<Selection[]> {
	const names = options.db_source === "auto" ? ROW_COLLECTIONS : [options.db_source];
	const found: Selection[] = [];
	for (const collection of names) {
		const lastStep = options.retrained_interval > 1 ? await lastTrainedStep(connection, collection) : -1;
		found.push({ collection, filter: all(conditionsOf(collection, options, lastStep)) });
	}
	return found;
}

/** The error if both collections have rows and none was chosen. */
export function ambiguous(
	connection: MongoConnection,
	counts: { collection: RowCollection; rows: number }[],
): ArlError {
	const names = counts.map(({ collection, rows }) => `${collection} (${rows})`).join(" and ");
	return new ArlError(
		"ARL_CONFIG",
		`${connection.address} has rows in both ${names}`,
		"Choose with --db_source Record or --db_source DBRecordData.",
	);
}

/** The chosen collection, or the one that has rows now. */
export async function selectionWithRows(connection: MongoConnection, options: SelectionOptions): Promise<Selection> {
	const possible = await selections(connection, options);
	const found: (Selection & { rows: number })[] = [];
	for (const selection of possible) {
		if (possible.length === 1) return selection;
		const documents = connection.db.collection(selection.collection);
		const rows = await connection.attempt("counting documents", () => documents.countDocuments(selection.filter));
		if (rows > 0) found.push({ ...selection, rows });
	}
	const [first, second] = found;
	if (second !== undefined) throw ambiguous(connection, found);
	if (first !== undefined) return first;
	throw new ArlError(
		"ARL_CONFIG",
		`${connection.address} has no rows yet, and no collection to follow was chosen`,
		"Choose with --db_source Record or --db_source DBRecordData.",
	);
}

/** The error if no document matches: how many match each condition alone. */
export async function nothingFound(connection: MongoConnection, options: SelectionOptions): Promise<ArlError> {
	const names = options.db_source === "auto" ? ROW_COLLECTIONS : [options.db_source];
	const lines: string[] = [];
	for (const name of names) {
		const documents = connection.db.collection(name);
		const total = await connection.attempt("counting documents", () => documents.countDocuments({}));
		const left: string[] = [];
		const lastStep = options.retrained_interval > 1 ? await lastTrainedStep(connection, name) : -1;
		for (const { name: condition, filter } of total > 0 ? conditionsOf(name, options, lastStep) : []) {
			left.push(
				`${await connection.attempt("counting documents", () => documents.countDocuments(filter))} with ${condition}`,
			);
		}
		lines.push(`${name}: ${total} documents${left.length > 0 ? `; of them ${left.join(", ")}` : ""}`);
	}
	return new ArlError(
		"ARL_DATA",
		[`${connection.address}: no document is left to train on`, ...lines].join("\n"),
		"Each condition was counted alone. Use a higher --max_trained_count for rows that were trained, --split for other splits; `arl mongo status` shows the documents, `arl mongo import` writes rows.",
	);
}
