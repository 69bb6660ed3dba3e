/** Whether a generated reply is the expected one: tool calls are compared as JSON, all else exactly. */
import { isDeepStrictEqual } from "node:util";
import type { ChatMessage, ToolCall } from "../../data/sources/record.js";
import { parseReply } from "./parse-reply.js";

/** Compares two texts of replies. */
export function isSameReply(reply: string, expected: string): boolean {
	if (reply === expected) return true;
	const [a, b] = [parseReply(reply), parseReply(expected)];
	// Without calls the text decides, its white space included.
	if (!a.tool_calls || !b.tool_calls) return false;
	return sameText(a, b) && isDeepStrictEqual(a.tool_calls.map(callOf), b.tool_calls.map(callOf));
}

function sameText(a: ChatMessage, b: ChatMessage): boolean {
	return a.content === b.content && a.reasoning_content === b.reasoning_content;
}

function callOf({ function: { name, arguments: given } }: ToolCall) {
	return { name, arguments: typeof given === "string" ? JSON.parse(given) : given };
}
