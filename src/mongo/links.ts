/**
 * Links between documents, in every form that occurs: DBRef, `{ id, collection }`, a raw id, the document itself. Fetches many
 * at once, by `_id`.
 */
import { type Document, ObjectId } from "mongodb";
import {
	type BsonValue,
	bsonKind,
	DocumentProblem,
	documentOf,
	driverValue,
	fieldsOf,
	get,
	isNothing,
	isObject,
	isString,
	stringOf,
	valueKey,
} from "./bson-json.js";
import type { MongoConnection } from "./connection.js";

/** The target of a link. */
export type Link =
	| { kind: "embedded"; document: BsonValue }
	| { kind: "reference"; database: string | null; collection: string; id: BsonValue };

/** Reads a link; `collection`: the target of a raw id. Throws a `DocumentProblem` if it is not a link. */
export function readLink(value: BsonValue | undefined, collection: string): Link {
	if (isNothing(value))
		throw new DocumentProblem("missing link", `is ${bsonKind(value)}, and should link to ${collection}`);
	if (!isObject(value)) {
		if (/^a(n)? (string|number|ObjectId)$|^binary/.test(bsonKind(value))) {
			return { kind: "reference", database: null, collection, id: value };
		}
		throw new DocumentProblem("wrong type", `is ${bsonKind(value)}, which is not a link to ${collection}`);
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

/** The `_id`s that a link may refer to: an ObjectId may be written as its 24 hexadecimal digits. */
function candidates(id: BsonValue): { key: string; value: unknown }[] {
	const own = { key: valueKey(id), value: driverValue(id) };
	if (!isString(id)) return [own];
	const hex = stringOf(id);
	if (!/^[0-9a-f]{24}$/i.test(hex)) return [own];
	return [own, { key: `7:${hex.toLowerCase()}`, value: new ObjectId(hex) }];
}

/** The fetched targets of links. */
export class Linked {
	private readonly byCollection = new Map<string, Map<string, BsonValue>>();

	/** A key for a collection. */
	private static place(link: { database: string | null; collection: string }): string {
		return `${link.database ?? ""}\0${link.collection}`;
	}

	/** The document that a link leads to; throws a `DocumentProblem` if it does not exist. */
	follow(link: Link): BsonValue {
		if (link.kind === "embedded") return link.document;
		const documents = this.byCollection.get(Linked.place(link));
		for (const { key } of candidates(link.id)) {
			const found = documents?.get(key);
			if (found !== undefined) return found;
		}
		throw new DocumentProblem("missing link", `links to ${link.collection} ${idText(link.id)}, which does not exist`);
	}

	/** Fetches the targets of `links`, with one request per collection and `BATCH_IDS` ids. */
	static async fetch(connection: MongoConnection, links: Iterable<Link>, projection?: Document): Promise<Linked> {
		const wanted = new Map<string, { link: Link & { kind: "reference" }; ids: Map<string, unknown> }>();
		for (const link of links) {
			if (link.kind === "embedded") continue;
			const place = Linked.place(link);
			const group = wanted.get(place) ?? { link, ids: new Map<string, unknown>() };
			for (const { key, value } of candidates(link.id)) group.ids.set(key, value);
			wanted.set(place, group);
		}
		const linked = new Linked();
		for (const [place, { link, ids }] of wanted) {
			const db = link.database === null ? connection.db : connection.database(link.database);
			const documents = await fetchByIds(connection, db.collection(link.collection), [...ids.values()], projection);
			linked.byCollection.set(place, documents);
		}
		return linked;
	}
}

const BATCH_IDS = 256;

/** What `fetchByIds` needs from a collection. */
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

/** An `_id` for people: the hexadecimal digits of an ObjectId, the text of a string. */
export function idText(id: BsonValue): string {
	const value = driverValue(id);
	return value instanceof ObjectId ? value.toHexString() : String(value);
}
