/**
 * Converts a row to the documents that AgentRL would have written for it, exact to the digit and in the order of its keys. Knows
 * rows and documents, not connections. Ids are derived from the content, so that equal rows are the same document.
 */
import { createHash } from "node:crypto";
import { DBRef, Double, Int32, Long, ObjectId } from "mongodb";
import { type JsonObject, type JsonValue, jsonText, RowProblem } from "../data/sources/json-value.js";
import type { CollectionName, Split } from "./documents.js";
import { extras, type ReadRow, trainedReplies, wrongKind } from "./read-row.js";

/** The class of the documents that rows are imported as. */
export type ImportKind = "DBRecordData" | "Record";

/** A value that the driver can write; Map keeps the order of keys. */
export type BsonInput =
	| null
	| boolean
	| string
	| Date
	| Int32
	| Long
	| Double
	| ObjectId
	| DBRef
	| BsonInput[]
	| BsonDocument;
export type BsonDocument = Map<string, BsonInput>;

/** The tools of a document, and the (sub)document that contains them. */
interface ToolsPlace {
	holder: BsonDocument;
	tools: JsonValue[];
}

/** A document to be written. */
export interface Outgoing {
	collection: CollectionName;
	document: BsonDocument;
	/** Null: it has no tools. */
	tools: ToolsPlace | null;
}

const INT64 = 2n ** 63n;

/**
 * A JSON value for the driver: integers as Int32 or Long, floats as Double, even integral ones. Throws `RowProblem` for an
 * integer beyond 64 bits and for a key that BSON does not allow.
 */
function toBson(value: JsonValue): BsonInput {
	if (typeof value === "bigint") {
		if (value >= -(2n ** 31n) && value < 2n ** 31n) return new Int32(Number(value));
		if (value < -INT64 || value >= INT64) {
			throw new RowProblem("too large", `the integer ${value} has more than the 64 bits that MongoDB's integers have`);
		}
		return Long.fromBigInt(value);
	}
	if (typeof value === "number") return new Double(value);
	if (Array.isArray(value)) return value.map(toBson);
	if (value instanceof Map) return toDocument(value);
	return value;
}

function toDocument(value: JsonObject): BsonDocument {
	const document: BsonDocument = new Map();
	for (const [key, item] of value) {
		if (key.includes("\0")) throw new RowProblem("bad field", "a key with the character U+0000 in it");
		document.set(key, toBson(item));
	}
	return document;
}

/** Tools for a document: as BSON, or as JSON text if BSON cannot represent them. */
function toolsOf(tools: JsonValue[]): BsonInput {
	try {
		return toBson(tools);
	} catch (error) {
		if (error instanceof RowProblem) return jsonText(tools);
		throw error;
	}
}

const placeOf = (holder: BsonDocument, tools: JsonValue[] | null) => (tools === null ? null : { holder, tools });

/** Whether a document stores its tools as text. */
export function hasToolsAsText({ tools }: Outgoing): boolean {
	return typeof tools?.holder.get("tools") === "string";
}

/** Stores the tools of a document as JSON text, which rows may have too; false: it has none, or stores them so already. */
export function setToolsAsText(outgoing: Outgoing): boolean {
	if (outgoing.tools === null || hasToolsAsText(outgoing)) return false;
	outgoing.tools.holder.set("tools", jsonText(outgoing.tools.tools));
	return true;
}

/** What a row's ids are derived from. */
export interface RowIdentity {
	/** A hash over its content, kind and split: the last eight bytes of its document's id. */
	hash: bigint;
	/** Its position among all rows: the first four bytes, so that ids have the order of the file. */
	place: number;
	/** The number of earlier rows with the same hash. */
	copy: number;
}

/** The hash at the end of a row's id. */
export function rowHash(row: ReadRow, kind: ImportKind, split: Split): bigint {
	const hash = createHash("sha256").update(`${kind}\n${split}\n`).update(jsonText(row.fields));
	return hash.digest().readBigUInt64BE();
}

function mainId({ hash, place }: RowIdentity): ObjectId {
	const bytes = Buffer.alloc(12);
	bytes.writeUInt32BE(place);
	bytes.writeBigUInt64BE(hash, 4);
	return new ObjectId(bytes);
}

/** The place and hash of an id. */
export function idParts(id: ObjectId): Pick<RowIdentity, "hash" | "place"> {
	const bytes = Buffer.from(id.id);
	return { place: bytes.readUInt32BE(), hash: bytes.readBigUInt64BE(4) };
}

/** The id of a document that a row's main document links to; it does not depend on the row's place. */
function partId({ hash, copy }: RowIdentity, part: string): ObjectId {
	return new ObjectId(createHash("sha256").update(`${hash} ${copy} ${part}`).digest().subarray(0, 12));
}

/** The documents of a row in the order in which they are written: link targets first. */
export function rowDocuments(row: ReadRow, kind: ImportKind, split: Split, identity: RowIdentity): Outgoing[] {
	return kind === "Record" ? recordDocuments(row, split, identity) : [recordData(row, split, identity)];
}

const orElse = (value: JsonValue | undefined, other: JsonValue): JsonValue => value ?? other;

function recordData(row: ReadRow, split: Split, identity: RowIdentity): Outgoing {
	const { fields } = row;
	const document: BsonDocument = new Map<string, BsonInput>([
		["_id", mainId(identity)],
		["_class_id", "DBRecordData"],
		["messages", row.messages.map(toDocument)],
		["tools", row.tools === null ? null : toolsOf(row.tools)],
		["scores", toBson(orElse(fields.get("scores"), new Map()))],
		["advantages", toBson(orElse(fields.get("advantages"), new Map()))],
		["created_at_step", toBson(orElse(fields.get("created_at_step"), new Map()))],
		["reward", toBson(orElse(fields.get("reward"), 1))],
		["step", toBson(orElse(fields.get("step"), -1n))],
		["logprobs", toBson(orElse(fields.get("logprobs"), null))],
		["record_id", recordId(fields.get("record_id"))],
	]);
	for (const [key, value] of extras(fields)) document.set(key, toBson(value));
	document.set("split", split);
	document.set("fetched", false);
	return { collection: "DBRecordData", document, tools: placeOf(document, row.tools) };
}

/** An id is a string in AgentRL's model; rows may have an integer. */
function recordId(value: JsonValue | undefined): string | null {
	if (value === undefined || value === null) return null;
	if (typeof value === "bigint") return String(value);
	if (typeof value !== "string") throw wrongKind("record_id", value, "a string");
	return value;
}

/** Keys next to `messages` that change what is trained, and that a Record cannot store. */
const TRAINED_KEYS = [
	"chat_template_kwargs",
	"system",
	"functions",
	"images",
	"image",
	"videos",
	"audios",
	"label",
	"kto_tag",
];

function saysSomething(value: JsonValue | undefined): boolean {
	if (value === undefined || value === null || value === "") return false;
	if (Array.isArray(value)) return value.length > 0;
	return value instanceof Map ? value.size > 0 : true;
}

/**
 * A row as a Task, one DispatchedSamplingTask per trained reply (a conversation and its reply, as a sampler writes them), and
 * the Record that links to them. Throws `RowProblem` for rows that these cannot represent.
 */
function recordDocuments(row: ReadRow, split: Split, identity: RowIdentity): Outgoing[] {
	const { fields, messages, maps } = row;
	const replies = trainedReplies(row);
	const last = replies.at(-1);
	if (last === undefined) throw new RowProblem("no targets", "no reply of the assistant is trained");
	if (last !== messages.length - 1) {
		throw new RowProblem(
			"not a Record",
			`${messages.length - 1 - last} messages follow the last trained reply, and a Record ends with one; import it as DBRecordData`,
		);
	}
	const lost = TRAINED_KEYS.find((key) => saysSomething(fields.get(key)));
	if (lost !== undefined) {
		throw new RowProblem("not a Record", `a Record has no place for \`${lost}\`; import it as DBRecordData`);
	}
	const taskId = partId(identity, "Task");
	const task = new DBRef("Task", taskId);
	const score = toBson(orElse(fields.get("reward"), 1));
	const now = new Date();
	const samples = replies.map((index): Outgoing => {
		const reply = messages[index] ?? new Map();
		const calls = reply.get("tool_calls");
		const request: BsonDocument = new Map<string, BsonInput>([
			["messages", messages.slice(0, index).map(toDocument)],
			...(row.tools === null ? [] : [["tools", toolsOf(row.tools)] satisfies [string, BsonInput]]),
			["model", null],
		]);
		const choice: BsonDocument = new Map<string, BsonInput>([
			["index", new Int32(0)],
			["message", toDocument(reply)],
			["finish_reason", Array.isArray(calls) && calls.length > 0 ? "tool_calls" : "stop"],
			["logprobs", toBson(orElse(maps.logprobs.get(index), null))],
		]);
		const document: BsonDocument = new Map<string, BsonInput>([
			["_id", partId(identity, `DispatchedSamplingTask ${index}`)],
			["_class_id", "DispatchedSamplingTask"],
			["task", task],
			["traj_id", new Int32(0)],
			["req_type", "chatcompletions"],
			["request", request],
			[
				"response",
				new Map<string, BsonInput>([
					["object", "chat.completion"],
					["choices", [choice]],
				]),
			],
			["sampled_from", null],
			["priority", new Int32(0)],
			["creat_time", now],
			["finish_time", now],
			["score", toBson(orElse(maps.scores.get(index), null))],
			["advantage", toBson(orElse(maps.advantages.get(index), 1))],
			["created_at_step", toBson(orElse(maps.created_at_step.get(index), 0n))],
			["is_minio_managed", false],
			["task_type", null],
			["status", "completed"],
		]);
		return { collection: "DispatchedSamplingTask", document, tools: placeOf(request, row.tools) };
	});
	const taskDocument: BsonDocument = new Map<string, BsonInput>([
		["_id", taskId],
		["_class_id", "Task"],
		["tid", taskId.toHexString()],
		["split", split],
		["epoch", new Int32(0)],
		["added_step", new Int32(0)],
		["description", ""],
		["num_samples", new Int32(1)],
		["scores", [score]],
		["status", "completed"],
	]);
	const record: BsonDocument = new Map<string, BsonInput>([
		["_id", mainId(identity)],
		["_class_id", "Record"],
		["task", task],
		["split", split],
		["traj_id", new Int32(0)],
		["traj", samples.map(({ document }) => new DBRef("DispatchedSamplingTask", idIn(document)))],
		["meta_infos", toDocument(metaInfos(row, replies))],
		["status", "ready"],
		["score", score],
		["trained_count", new Int32(0)],
		["last_trained_step", new Int32(-1)],
	]);
	return [
		{ collection: "Task", document: taskDocument, tools: null },
		...samples,
		{ collection: "Record", document: record, tools: null },
	];
}

/** The id of a document. */
export function idIn(document: BsonDocument): ObjectId {
	const id = document.get("_id");
	if (!(id instanceof ObjectId)) throw new TypeError("a document without an _id");
	return id;
}

/** The fields of a row that the other documents cannot store. */
function metaInfos(row: ReadRow, replies: number[]): JsonObject {
	const rest: JsonObject = new Map(extras(row.fields).filter(([key]) => !TRAINED_KEYS.includes(key)));
	for (const name of ["record_id", "step"] as const) {
		const value = row.fields.get(name);
		if (value !== undefined && value !== null) rest.set(name, value);
	}
	for (const name of ["scores", "created_at_step", "logprobs"] as const) {
		const left = [...row.maps[name]].filter(([index]) => !replies.includes(index));
		if (left.length > 0) rest.set(name, new Map(left.map(([index, value]) => [String(index), value])));
	}
	return rest;
}
