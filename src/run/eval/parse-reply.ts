/** From the text of a reply in Qwen's ChatML to a message: its reasoning and its tool calls apart from its content. */
import type { ChatMessage, ToolCall } from "../../data/sources/record.js";

const TOOL_CALL = /<tool_call>\s*(.*?)\s*<\/tool_call>/gs;

/** The message that a reply's text says. A tool call that is not valid JSON stays a part of the content. */
export function parseReply(text: string): ChatMessage {
	// The opening tag may be a part of the prompt.
	const thought = /^\s*(?:<think>)?(.*?)<\/think>/s.exec(text);
	const said = thought === null ? text : text.slice(thought[0].length);
	const calls: ToolCall[] = [];
	const content = said.replace(TOOL_CALL, (whole, body: string) => {
		const call = toolCall(body);
		if (call === null) return whole;
		calls.push(call);
		return "";
	});
	const trims = thought !== null || calls.length > 0;
	return {
		role: "assistant",
		content: trims ? content.trim() : content,
		...(thought?.[1]?.trim() && { reasoning_content: thought[1].trim() }),
		...(calls.length > 0 && { tool_calls: calls }),
	};
}

/** A call as a model writes it, with its arguments' own text. */
const CALL = /^\{\s*"name":\s*"[^"]*",\s*"arguments":\s*(\{.*\})\s*\}$/s;

function toolCall(body: string): ToolCall | null {
	try {
		const { name, arguments: given = {} } = JSON.parse(body) as { name?: unknown; arguments?: unknown };
		if (typeof name !== "string" || typeof given !== "object" || given === null) return null;
		return { type: "function", function: { name, arguments: argumentsText(body) ?? JSON.stringify(given) } };
	} catch {
		return null;
	}
}

/** The arguments as the model wrote them, so that the next turn's prompt has the same tokens; null: they are not found. */
function argumentsText(body: string): string | null {
	const text = CALL.exec(body)?.[1];
	try {
		if (text !== undefined) JSON.parse(text);
		return text ?? null;
	} catch {
		return null;
	}
}
