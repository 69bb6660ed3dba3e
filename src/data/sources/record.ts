/**
 * The type of a training row. Files may have rows of other shapes; the core converts them into this one.
 */

/** A part of a message's content. */
export type ContentPart =
	| { type: "text"; text: string }
	| { type: "image_url"; image_url: { url: string; detail?: string } };

export interface ToolCall {
	id?: string;
	type?: "function";
	/** `arguments`: JSON text, as OpenAI sends it, or the object itself. */
	function: { name: string; arguments: string | Record<string, unknown> };
}

/** A chat message as in OpenAI's API. */
export interface ChatMessage {
	role: "system" | "developer" | "user" | "assistant" | "tool";
	content?: string | ContentPart[] | null;
	name?: string;
	reasoning_content?: string | null;
	tool_calls?: ToolCall[] | null;
	tool_call_id?: string | null;
	/** False: this reply is not trained. */
	train?: boolean;
	/** Weight of this reply's tokens in the loss. Absent: 1. */
	weight?: number;
}

/** A value by message index. Keys may be numbers or strings, because JSON has only strings. */
export type ByMessage<T> = Record<number | string, T>;

/**
 * A training row. `scores`, `advantages`, `created_at_step` and `logprobs` describe replies by message index; only replies with
 * an advantage are trained, or every assistant message if there are no `advantages`.
 */
export interface RecordData {
	messages: ChatMessage[];
	/** JSON schemas of the available tools. */
	tools?: Record<string, unknown>[] | null;
	scores?: ByMessage<number> | null;
	advantages?: ByMessage<number> | null;
	created_at_step?: ByMessage<number> | null;
	logprobs?: ByMessage<unknown> | null;
	/** Absent: 1. */
	reward?: number | null;
	/** Absent: -1. */
	step?: number | null;
	record_id?: string | null;
}
