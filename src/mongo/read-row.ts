/**
 * Parses and checks a row of `RecordData` before it becomes documents, as strictly as training does. Knows only rows.
 */
import {
	type JsonObject,
	type JsonValue,
	jsonText,
	kindOf,
	parseJson,
	RowProblem,
} from "../data/sources/json-value.js";
import { COLLECTIONS, SPLITS, type Split } from "./documents.js";

/** Keys for bookkeeping in the database. */
const RESERVED = [
	"_id",
	"_class_id",
	"revision_id",
	"fetched",
	"trained_count",
	"last_trained_step",
	"arl_acks",
	"arl_claim",
];
const ROLES = ["system", "developer", "user", "assistant", "tool", "function"];
const BY_MESSAGE = ["scores", "advantages", "created_at_step", "logprobs"] as const;

/** A row, read and checked. */
export interface ReadRow {
	fields: JsonObject;
	messages: JsonObject[];
	tools: JsonValue[] | null;
	maps: Record<(typeof BY_MESSAGE)[number], Map<number, JsonValue>>;
}

/** Reads and checks a row of `RecordData`. Throws `RowProblem`. */
export function readRow(bytes: Uint8Array): ReadRow {
	const fields = parseJson(bytes);
	if (!(fields instanceof Map)) throw new RowProblem("shape", `the row is ${kindOf(fields)}, not an object`);
	const list = fields.get("messages");
	if (list === undefined || list === null) {
		const keys = [...fields.keys()].slice(0, 8).join(", ");
		throw new RowProblem("no messages", `no messages: the row has ${keys}; only rows of messages are imported`);
	}
	if (!Array.isArray(list)) throw wrongKind("messages", list, "an array");
	if (list.length === 0) throw new RowProblem("no messages", "no messages: the list is empty");
	const messages = list.map(checkMessage);
	for (const key of fields.keys()) {
		if (RESERVED.includes(key)) {
			throw new RowProblem("bad field", `\`${key}\` is reserved for the database; remove it from the row`);
		}
		if (key === "" || key.startsWith("$") || /[.\0]/.test(key)) {
			throw new RowProblem("bad field", `a document cannot have the key ${JSON.stringify(key)}`);
		}
	}
	checkNumber(fields, "reward");
	checkNumber(fields, "step");
	const map = (name: (typeof BY_MESSAGE)[number]) => readMap(fields, name, messages);
	return {
		fields,
		messages,
		tools: readTools(fields.get("tools")),
		maps: {
			scores: map("scores"),
			advantages: map("advantages"),
			created_at_step: map("created_at_step"),
			logprobs: map("logprobs"),
		},
	};
}

/** The error for a field of the wrong type. */
export function wrongKind(name: string, found: JsonValue | undefined, wanted: string): RowProblem {
	return new RowProblem("bad field", `\`${name}\` is ${kindOf(found)}, not ${wanted}`);
}

function checkMessage(message: JsonValue, index: number): JsonObject {
	if (!(message instanceof Map)) throw wrongKind(`messages[${index}]`, message, "an object");
	const role = message.get("role");
	if (typeof role !== "string") throw wrongKind(`messages[${index}].role`, role, "a string");
	if (!ROLES.includes(role)) throw new RowProblem("unknown role", `messages[${index}]: unknown role \`${role}\``);
	return message;
}

function checkNumber(fields: JsonObject, name: string): void {
	const value = fields.get(name) ?? null;
	if (value !== null && typeof value !== "bigint" && typeof value !== "number")
		throw wrongKind(name, value, "a number");
}

/** Tools as a list; in files they may be JSON text. */
function readTools(value: JsonValue | undefined): JsonValue[] | null {
	if (value === undefined || value === null) return null;
	if (typeof value === "string") {
		return value.trim() === "" ? null : readTools(parseJson(new TextEncoder().encode(value)));
	}
	if (!Array.isArray(value)) throw wrongKind("tools", value, "an array");
	return value;
}

function readMap(
	fields: JsonObject,
	name: (typeof BY_MESSAGE)[number],
	messages: JsonObject[],
): Map<number, JsonValue> {
	const value = fields.get(name);
	const found = new Map<number, JsonValue>();
	if (value === undefined || value === null) return found;
	if (!(value instanceof Map)) throw wrongKind(name, value, "a map from message index to a value");
	for (const [key, item] of value) {
		const index = /^\s*\d+\s*$/.test(key) ? Number(key) : -1;
		if (messages[index]?.get("role") !== "assistant") {
			throw new RowProblem("bad index", `\`${name}\` names message ${key}, which is not a reply of the assistant`);
		}
		if (name !== "logprobs" && typeof item !== "bigint" && typeof item !== "number") {
			throw wrongKind(`${name}[${key}]`, item, "a number");
		}
		found.set(index, item);
	}
	return found;
}

/** The split that a row names; null: none. Throws `RowProblem` for a split that AgentRL does not have. */
export function splitOf(row: ReadRow): Split | null {
	const value = row.fields.get("split");
	if (value === undefined || value === null) return null;
	const split = SPLITS.find((name) => name === value);
	if (split === undefined) {
		throw new RowProblem("bad field", `\`split\` is ${jsonText(value)}, not one of ${SPLITS.join(", ")}`);
	}
	return split;
}

/** A row's fields beyond `RecordData`. */
export function extras(fields: JsonObject): [string, JsonValue][] {
	return [...fields].filter(([key]) => !COLLECTIONS.DBRecordData.fields.includes(key));
}

/** The replies that a run would train, by message index. */
export function trainedReplies(row: ReadRow): number[] {
	const { advantages } = row.maps;
	return row.messages.flatMap((message, index) => {
		const chosen = message.get("role") === "assistant" && message.get("train") !== false;
		return chosen && (advantages.size === 0 || advantages.has(index)) ? [index] : [];
	});
}
