/**
 * Links between documents, in every form that they are found in: DBRef, `{ id, collection }`, a raw id, the document itself.
 * Many are fetched at once, by `_id`.
 */
import { type Document, ObjectId } from "mongodb";
import {
	type BsonValue,
	DocumentProblem,
	documentOf,
	driverValue,
	fieldsOf,
	get,
	isNothing,
	isObject,
	isString,
	kindOf,
	stringOf,
	valueKey,
} from "./bson-json.js";
import type { MongoConnection } from "./connection.js";

/** Where a link leads. */
export type Link =
	| { kind: "embedded"; document: BsonValue }
	| { kind: "reference"; database: string | null; collection: string; id: BsonValue };

/** Reads a link; `collection`: where a raw id leads. Throws a `DocumentProblem` for what is none. */
export function readLink(value: BsonValue | undefined, collection: string): Link {
	if (isNothing(value))
		throw new DocumentProblem("missing link", `is ${kindOf(value)}, and should link to ${collection}`);
	if (!isObject(value)) {
		if (/^a(n)? (string|number|ObjectId)$|^binary/.test(kindOf(value))) {
			return { kind: "reference", database: null, collection, id: value };
		}
		throw new DocumentProblem("wrong type", `is ${kindOf(value)}, which is no link to ${collection}`);
	}
	const fields = fieldsOf(value);
	const id = fields.get("$id") ?? (fields.has("collection") && fields.size <= 2 ? fields.get("id") : undefined);
	if (id === undefined) {
		if (fields.has("$ref")) throw new DocumentProblem("wrong type", "is a DBRef without $id");
		return { kind: "embedded", document: value };
	}
	const target = fields.get("$ref") ?? fields.get("collection");
	const database = fields.get("$db");
	return {
		kind: "reference",
		database: isString(database) ? stringOf(database) : null,
		collection: isString(target) ? stringOf(target) : collection,
		id,
	};
}

/** The `_id`s that a link may mean: an ObjectId is also written as its 24 hexadecimal digits. */
function meant(id: BsonValue): { key: string; value: unknown }[] {
	const own = { key: valueKey(id), value: driverValue(id) };
	if (!isString(id)) return [own];
	const hex = stringOf(id);
	if (!/^[0-9a-f]{24}$/i.test(hex)) return [own];
	return [own, { key: `7:${hex.toLowerCase()}`, value: new ObjectId(hex) }];
}

/** Documents by their place, as they were fetched. */
export class Linked {
	private readonly byCollection = new Map<string, Map<string, BsonValue>>();

	/** Name of a collection within this batch. */
	private static place(link: { database: string | null; collection: string }): string {
		return `${link.database ?? ""}\0${link.collection}`;
	}

	add(place: string, documents: Map<string, BsonValue>): void {
		this.byCollection.set(place, documents);
	}

	/** The document that a link leads to; throws a `DocumentProblem` where there is none. */
	follow(link: Link): BsonValue {
		if (link.kind === "embedded") return link.document;
		const documents = this.byCollection.get(Linked.place(link));
		for (const { key } of meant(link.id)) {
			const found = documents?.get(key);
			if (found !== undefined) return found;
		}
		throw new DocumentProblem("missing link", `links to ${link.collection} ${idText(link.id)}, which does not exist`);
	}

	/** Fetches all that `links` lead to, with at most one request a collection and `BATCH_IDS` ids. */
	static async fetch(connection: MongoConnection, links: Iterable<Link>, projection?: Document): Promise<Linked> {
		const wanted = new Map<string, { link: Link & { kind: "reference" }; ids: Map<string, unknown> }>();
		for (const link of links) {
			if (link.kind === "embedded") continue;
			const place = Linked.place(link);
			const group = wanted.get(place) ?? { link, ids: new Map<string, unknown>() };
			for (const { key, value } of meant(link.id)) group.ids.set(key, value);
			wanted.set(place, group);
		}
		const linked = new Linked();
		for (const [place, { link, ids }] of wanted) {
			const db = link.database === null ? connection.db : connection.database(link.database);
			linked.add(place, await fetchByIds(connection, db.collection(link.collection), [...ids.values()], projection));
		}
		return linked;
	}
}

const BATCH_IDS = 256;

/** What of a collection `fetchByIds` needs. */
interface Findable {
	find(filter: Document, options: Document): { toArray(): Promise<Document[]> };
}

/** Documents with these `_id`s as raw BSON, by `valueKey` of their `_id`. */
export async function fetchByIds(
	connection: MongoConnection,
	collection: Findable,
	ids: unknown[],
	projection?: Document,
): Promise<Map<string, BsonValue>> {
	const found = new Map<string, BsonValue>();
	for (let at = 0; at < ids.length; at += BATCH_IDS) {
		const part = ids.slice(at, at + BATCH_IDS);
		const documents = await connection.attempt("reading documents", () =>
			collection
				.find({ _id: { $in: part } }, { raw: true, batchSize: BATCH_IDS, ...(projection && { projection }) })
				.toArray(),
		);
		for (const bytes of documents) {
			const document = documentOf(bytes as Uint8Array);
			const id = get(document, "_id");
			if (id !== undefined) found.set(valueKey(id), document);
		}
	}
	return found;
}

/** An `_id` as people write it: the hexadecimal digits of an ObjectId, the text of a string. */
export function idText(id: BsonValue): string {
	const value = driverValue(id);
	return value instanceof ObjectId ? value.toHexString() : String(value);
}
