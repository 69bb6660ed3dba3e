/**
 * AgentRL's documents to rows: a `Record` with the samples of its trajectory, and a `DBRecordData`, each as the JSON text of
 * `RecordData`. Pure: what a document links to is given.
 */
import { floatText } from "../data/sources/json-text.js";
import {
	type BsonValue,
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
	jsonText,
	kindOf,
	numberOf,
	stringOf,
} from "./bson-json.js";

/** A record and what it links to. */
export interface RecordParts {
	record: BsonValue;
	/** Absent: the record links to no task. */
	task: BsonValue | undefined;
	/** In the order of `traj`. */
	samples: BsonValue[];
}

/** Fields of a `DBRecordData` that say how it stands in the database and are no part of the row. */
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
/** Maps from message index; in Python they had integers as keys. */
const BY_MESSAGE = ["scores", "advantages", "created_at_step", "logprobs"];

/** A `DBRecordData` as a row. */
export function recordDataRow(document: BsonValue): string {
	const parts: string[] = [];
	for (const [key, value] of entries(document)) {
		if (BOOKKEEPING.includes(key)) continue;
		// Tools as text are how servers store keys with dots and `$` that they refuse otherwise.
		const name = key === "tools_json" ? "tools" : key;
		const written = inKey(key, () => (BY_MESSAGE.includes(key) && isArray(value) ? byPlace(value) : jsonText(value)));
		parts.push(`${JSON.stringify(name)}:${written}`);
	}
	return `{${parts.join(",")}}`;
}

/** A list with one place for each message as a map from message index; null stands for none. */
function byPlace(list: BsonValue): string {
	const given = itemsOf(list).flatMap((item, i) => (isNothing(item) ? [] : [`"${i}":${jsonText(item)}`]));
	return `{${given.join(",")}}`;
}

/** A completed sample: the conversation so far, and the reply. */
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

/** What becomes of one row while samples are merged into it. */
interface RowInProgress {
	last: Sample;
	messages: string[];
	/** What is compared: the sense of each message of the conversation, the last reply included. */
	senses: string[];
	byIndex: Map<number, Sample>;
}

/**
 * The rows of a record, the earliest first. Its completed samples are walked from the last one; a sample whose conversation
 * and reply begin a later one's becomes another trained reply of that row. A record whose samples all follow one another
 * is one row.
 *
 * @throws DocumentProblem for what cannot be a row.
 */
export function recordRows({ record, task, samples }: RecordParts): string[] {
	const completed = completedSamples(samples);
	const rows: RowInProgress[] = [];
	// A single sample has nothing to be compared with.
	const compare = completed.length > 1;
	for (const sample of completed.reverse()) {
		const index = sample.messages.length;
		const senses = compare ? [...sample.messages, sample.reply].map(senseOf) : [];
		const holder = rows.find((row) => row.last.tools === sample.tools && begins(senses, row.senses));
		if (holder === undefined) {
			const messages = [...sample.messages, sample.reply];
			rows.push({ last: sample, messages, senses, byIndex: new Map([[index, sample]]) });
		} else if (!holder.byIndex.has(index)) {
			holder.messages[index] = sample.reply;
			holder.byIndex.set(index, sample);
		}
	}
	return rows.reverse().map((row) => rowText(row, record, task));
}

function begins(senses: string[], conversation: string[]): boolean {
	return senses.length <= conversation.length && senses.every((sense, i) => sense === conversation[i]);
}

function completedSamples(samples: BsonValue[]): Sample[] {
	const found: Sample[] = [];
	const statuses = new Map<string, number>();
	for (const [i, document] of samples.entries()) {
		inKey(`traj[${i}]`, () => {
			const fields = fieldsOf(document);
			const status = fields.get("status");
			const name = isString(status) ? stringOf(status) : kindOf(status);
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
		const found = isString(role) ? JSON.stringify(stringOf(role)) : kindOf(role);
		throw new DocumentProblem(
			"bad index",
			`\`response.choices[0].message.role\`: ${found}, and a reply is the assistant's`,
		);
	}
	const tools = get(request, "tools") ?? get(request, "tools_json");
	const logprobs = get(choice, "logprobs");
	const created = fields.get("created_at_step");
	return {
		messages: inKey("request.messages", () => itemsOf(messages).map((message) => jsonText(message))),
		reply: inKey("response.choices[0].message", () => jsonText(reply)),
		tools: tools === undefined ? undefined : inKey("request.tools", () => jsonText(tools)),
		logprobs: isNothing(logprobs) ? undefined : inKey("response.choices[0].logprobs", () => jsonText(logprobs)),
		createdAtStep: isNothing(created) ? undefined : jsonText(created),
		score: numeric(fields.get("score"), "score"),
		advantage: numeric(fields.get("advantage"), "advantage"),
		step,
	};
}

/** An uploader of AgentRL's wrote the request as an array with one element. */
function unwrapped(value: BsonValue | undefined): BsonValue | undefined {
	if (!isArray(value)) return value;
	const items = itemsOf(value);
	if (items.length === 1) return items[0];
	throw new DocumentProblem("wrong type", `\`request\`: an array of ${items.length} elements, not one request`);
}

function wrong(name: string, found: BsonValue | undefined, wanted: string): DocumentProblem {
	return new DocumentProblem("wrong type", `\`${name}\`: ${kindOf(found)}, not ${wanted}`);
}

function object(value: BsonValue | undefined, name: string): BsonValue {
	if (!isObject(value)) throw wrong(name, value, "an object");
	return value;
}

/** The field where it is a number; undefined: absent or null. */
function numeric(value: BsonValue | undefined, name: string): BsonValue | undefined {
	if (isNothing(value)) return undefined;
	if (numberOf(value) === null) throw wrong(name, value, "a number");
	inKey(name, () => jsonText(value));
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
		if (score !== undefined) scores.push(`"${index}":${jsonText(score)}`);
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
		...(recordScore === undefined ? [] : [`"reward":${jsonText(recordScore)}`]),
		`"step":${row.last.step}`,
		...(logprobs.length === 0 ? [] : [`"logprobs":{${logprobs.join(",")}}`]),
		...(id === undefined ? [] : [`"record_id":${jsonText(id)}`]),
	];
	return `{${fields.join(",")}}`;
}

/**
 * The sample's advantage, else its score, else by how much the record's score is above the mean of its task's scores. Where
 * there is nothing to compare with, a reply is as good as any: 1.
 */
function advantageText(sample: Sample, recordScore: BsonValue | undefined, task: BsonValue | undefined): string {
	const own = sample.advantage ?? sample.score;
	if (own !== undefined) return jsonText(own);
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

/** What of a message decides whether two are the same; a key that is null counts as absent. */
const SENSE = ["role", "content", "name", "function_call", "audio", "reasoning_content", "tool_calls"];

function senseOf(message: string): string {
	const value: unknown = JSON.parse(message);
	if (typeof value !== "object" || value === null) return message;
	const fields = new Map<string, unknown>(Object.entries(value));
	return SENSE.map((key) => {
		const field = fields.get(key);
		return JSON.stringify(
			key === "tool_calls" && Array.isArray(field) ? field.map(callSense) : canonical(field ?? null),
		);
	}).join("\n");
}

/** A call's id is drawn anew by whoever sends it. */
function callSense(call: unknown): unknown {
	if (typeof call !== "object" || call === null) return call;
	const fields = new Map<string, unknown>(Object.entries(call));
	return [fields.get("type") ?? null, canonical(fields.get("function") ?? null)];
}

/** The same value with the keys of objects in order. */
function canonical(value: unknown): unknown {
	if (Array.isArray(value)) return value.map(canonical);
	if (typeof value !== "object" || value === null) return value;
	return Object.entries(value)
		.filter(([, inner]) => inner !== null)
		.sort(([a], [b]) => (a < b ? -1 : 1))
		.map(([key, inner]) => [key, canonical(inner)]);
}
