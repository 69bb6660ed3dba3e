/**
 * Converts AgentRL's documents to rows: a `Record` with the samples of its trajectory, or a `DBRecordData`, to the JSON text of
 * `RecordData`. Pure: the caller passes the linked documents.
 */
import { floatText } from "../data/sources/json-text.js";
import {
	type BsonValue,
	bsonKind,
	bsonText,
	DocumentProblem,
	entries,
	fieldsOf,
	get,
	inKey,
	isArray,
	isNothing,
	isObject,
	isString,
	itemsOf,
	numberOf,
	stringOf,
} from "./bson-json.js";

/** A record and the documents that it links to. */
export interface RecordParts {
	record: BsonValue;
	/** Absent: the record links to no task. */
	task: BsonValue | undefined;
	/** In the order of `traj`. */
	samples: BsonValue[];
}

/** Fields of a `DBRecordData` for bookkeeping in the database, which are not part of the row. */
const BOOKKEEPING = [
	"_id",
	"_class_id",
	"revision_id",
	"split",
	"fetched",
	"trained_count",
	"last_trained_step",
	"arl_acks",
	"arl_claim",
];
/** Maps from message index; in Python their keys are integers. */
const BY_MESSAGE = ["scores", "advantages", "created_at_step", "logprobs"];

/** A `DBRecordData` as a row. */
export function recordDataRow(document: BsonValue): string {
	const parts: string[] = [];
	for (const [key, value] of entries(document)) {
		if (BOOKKEEPING.includes(key)) continue;
		// Servers that refuse keys with dots and `$` store tools as text.
		const name = key === "tools_json" ? "tools" : key;
		const written = inKey(key, () => (BY_MESSAGE.includes(key) && isArray(value) ? byIndex(value) : bsonText(value)));
		parts.push(`${JSON.stringify(name)}:${written}`);
	}
	return `{${parts.join(",")}}`;
}

/** A list with an element per message, as a map from message index; null elements are left out. */
function byIndex(list: BsonValue): string {
	const given = itemsOf(list).flatMap((item, i) => (isNothing(item) ? [] : [`"${i}":${bsonText(item)}`]));
	return `{${given.join(",")}}`;
}

/** A completed sample: a conversation and its reply. */
interface Sample {
	messages: string[];
	reply: string;
	tools: string | undefined;
	logprobs: string | undefined;
	createdAtStep: string | undefined;
	score: BsonValue | undefined;
	advantage: BsonValue | undefined;
	/** Its number among the completed ones. */
	step: number;
}

/** A row while samples are merged into it. */
interface RowInProgress {
	last: Sample;
	messages: string[];
	/** The comparison key of each message, the last reply included. */
	keys: string[];
	byIndex: Map<number, Sample>;
}

/**
 * The rows of a record, the earliest first. Goes through its completed samples from the last one; a sample whose conversation
 * and reply are the beginning of a later one becomes another trained reply of that row. A record whose samples all continue one
 * conversation is one row.
 *
 * @throws DocumentProblem if the record cannot be a row.
 */
export function recordRows({ record, task, samples }: RecordParts): string[] {
	const completed = completedSamples(samples);
	const rows: RowInProgress[] = [];
	// A single sample needs no comparison.
	const compare = completed.length > 1;
	for (const sample of completed.reverse()) {
		const index = sample.messages.length;
		const keys = compare ? [...sample.messages, sample.reply].map(messageKey) : [];
		const row = rows.find(({ last, keys: later }) => last.tools === sample.tools && isPrefix(keys, later));
		if (row === undefined) {
			const messages = [...sample.messages, sample.reply];
			rows.push({ last: sample, messages, keys, byIndex: new Map([[index, sample]]) });
		} else if (!row.byIndex.has(index)) {
			row.messages[index] = sample.reply;
			row.byIndex.set(index, sample);
		}
	}
	return rows.reverse().map((row) => rowText(row, record, task));
}

function isPrefix(keys: string[], conversation: string[]): boolean {
	return keys.length <= conversation.length && keys.every((key, i) => key === conversation[i]);
}

function completedSamples(samples: BsonValue[]): Sample[] {
	const found: Sample[] = [];
	const statuses = new Map<string, number>();
	for (const [i, document] of samples.entries()) {
		inKey(`traj[${i}]`, () => {
			const fields = fieldsOf(document);
			const status = fields.get("status");
			const name = isString(status) ? stringOf(status) : bsonKind(status);
			statuses.set(name, (statuses.get(name) ?? 0) + 1);
			if (name === "completed") found.push(readSample(fields, found.length));
		});
	}
	if (found.length > 0) return found;
	const what =
		samples.length === 0
			? "the trajectory is empty"
			: `none of its ${samples.length} samples is completed (${[...statuses].map(([name, n]) => `${n} ${name}`).join(", ")})`;
	throw new DocumentProblem("nothing completed", what);
}

function readSample(fields: Map<string, BsonValue>, step: number): Sample {
	const type = fields.get("req_type");
	if (isString(type) && stringOf(type) !== "chatcompletions") {
		throw new DocumentProblem(
			"wrong type",
			`\`req_type\`: ${JSON.stringify(stringOf(type))}; only chatcompletions have messages`,
		);
	}
	const request = object(unwrapped(fields.get("request")), "request");
	const messages = get(request, "messages");
	if (!isArray(messages)) throw wrong("request.messages", messages, "an array");
	const response = object(fields.get("response"), "response");
	const choices = get(response, "choices");
	if (!isArray(choices)) throw wrong("response.choices", choices, "an array");
	const choice = object(itemsOf(choices)[0], "response.choices[0]");
	const reply = object(get(choice, "message"), "response.choices[0].message");
	const role = get(reply, "role");
	if (!isString(role) || stringOf(role) !== "assistant") {
		const found = isString(role) ? JSON.stringify(stringOf(role)) : bsonKind(role);
		throw new DocumentProblem(
			"bad index",
			`\`response.choices[0].message.role\`: ${found}, and a reply must be the assistant's`,
		);
	}
	const tools = get(request, "tools") ?? get(request, "tools_json");
	const logprobs = get(choice, "logprobs");
	const created = fields.get("created_at_step");
	return {
		messages: inKey("request.messages", () => itemsOf(messages).map((message) => bsonText(message))),
		reply: inKey("response.choices[0].message", () => bsonText(reply)),
		tools: tools === undefined ? undefined : inKey("request.tools", () => bsonText(tools)),
		logprobs: isNothing(logprobs) ? undefined : inKey("response.choices[0].logprobs", () => bsonText(logprobs)),
		createdAtStep: isNothing(created) ? undefined : bsonText(created),
		score: numeric(fields.get("score"), "score"),
		advantage: numeric(fields.get("advantage"), "advantage"),
		step,
	};
}

/** An uploader of AgentRL writes the request as an array with one element. */
function unwrapped(value: BsonValue | undefined): BsonValue | undefined {
	if (!isArray(value)) return value;
	const items = itemsOf(value);
	if (items.length === 1) return items[0];
	throw new DocumentProblem("wrong type", `\`request\`: an array of ${items.length} elements, not one request`);
}

function wrong(name: string, found: BsonValue | undefined, wanted: string): DocumentProblem {
	return new DocumentProblem("wrong type", `\`${name}\`: ${bsonKind(found)}, not ${wanted}`);
}

function object(value: BsonValue | undefined, name: string): BsonValue {
	if (!isObject(value)) throw wrong(name, value, "an object");
	return value;
}

/** The field if it is a number; undefined: absent or null. */
function numeric(value: BsonValue | undefined, name: string): BsonValue | undefined {
	if (isNothing(value)) return undefined;
	if (numberOf(value) === null) throw wrong(name, value, "a number");
	inKey(name, () => bsonText(value));
	return value;
}

function rowText(row: RowInProgress, record: BsonValue, task: BsonValue | undefined): string {
	const recordScore = numeric(get(record, "score"), "score");
	const scores: string[] = [];
	const advantages: string[] = [];
	const steps: string[] = [];
	const logprobs: string[] = [];
	for (const [index, sample] of [...row.byIndex].sort(([a], [b]) => a - b)) {
		const score = sample.score ?? recordScore;
		if (score !== undefined) scores.push(`"${index}":${bsonText(score)}`);
		advantages.push(`"${index}":${advantageText(sample, recordScore, task)}`);
		if (sample.createdAtStep !== undefined) steps.push(`"${index}":${sample.createdAtStep}`);
		if (sample.logprobs !== undefined) logprobs.push(`"${index}":${sample.logprobs}`);
	}
	const id = get(record, "_id");
	const fields = [
		`"messages":[${row.messages.join(",")}]`,
		...(row.last.tools === undefined ? [] : [`"tools":${row.last.tools}`]),
		`"scores":{${scores.join(",")}}`,
		`"advantages":{${advantages.join(",")}}`,
		`"created_at_step":{${steps.join(",")}}`,
		...(recordScore === undefined ? [] : [`"reward":${bsonText(recordScore)}`]),
		`"step":${row.last.step}`,
		...(logprobs.length === 0 ? [] : [`"logprobs":{${logprobs.join(",")}}`]),
		...(id === undefined ? [] : [`"record_id":${bsonText(id)}`]),
	];
	return `{${fields.join(",")}}`;
}

/**
 * The sample's advantage, else its score, else the difference between the record's score and the mean of its task's scores;
 * 1 if there are no scores.
 */
function advantageText(sample: Sample, recordScore: BsonValue | undefined, task: BsonValue | undefined): string {
	const own = sample.advantage ?? sample.score;
	if (own !== undefined) return bsonText(own);
	const score = numberOf(recordScore);
	const scores = task === undefined ? undefined : get(task, "scores");
	if (score === null || !isArray(scores)) return floatText(1);
	const numbers = itemsOf(scores).map((item, i) => {
		const value = numberOf(item);
		if (value === null || !Number.isFinite(value)) throw wrong(`task.scores[${i}]`, item, "a finite number");
		return value;
	});
	if (numbers.length === 0) return floatText(1);
	return floatText(score - numbers.reduce((sum, value) => sum + value, 0) / numbers.length);
}

/** The fields that decide whether two messages are the same; null counts as absent. */
const COMPARED = ["role", "content", "name", "function_call", "audio", "reasoning_content", "tool_calls"];

function messageKey(message: string): string {
	const value: unknown = JSON.parse(message);
	if (typeof value !== "object" || value === null) return message;
	const fields = new Map<string, unknown>(Object.entries(value));
	return COMPARED.map((key) => {
		const field = fields.get(key);
		return JSON.stringify(key === "tool_calls" && Array.isArray(field) ? field.map(callKey) : canonical(field ?? null));
	}).join("\n");
}

/** Without the call's id: every sender generates its own. */
function callKey(call: unknown): unknown {
	if (typeof call !== "object" || call === null) return call;
	const fields = new Map<string, unknown>(Object.entries(call));
	return [fields.get("type") ?? null, canonical(fields.get("function") ?? null)];
}

/** The same value with sorted object keys. */
function canonical(value: unknown): unknown {
	if (Array.isArray(value)) return value.map(canonical);
	if (typeof value !== "object" || value === null) return value;
	return Object.entries(value)
		.filter(([, inner]) => inner !== null)
		.sort(([a], [b]) => (a < b ? -1 : 1))
		.map(([key, inner]) => [key, canonical(inner)]);
}
