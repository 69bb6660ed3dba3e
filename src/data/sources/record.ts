/**
 * The one shape of a row that the program trains on, as types. Files may hold other shapes; the core turns them into this.
 */

/** A part of a message's content. */
export type ContentPart =
	| { type: "text"; text: string }
	| { type: "image_url"; image_url: { url: string; detail?: string } };

export interface ToolCall {
	id?: string;
	type?: "function";
	/** `arguments`: a JSON text, as OpenAI sends it, or the object itself. */
	function: { name: string; arguments: string | Record<string, unknown> };
}

/** A chat message as OpenAI's API spells it. */
export interface ChatMessage {
	role: "system" | "developer" | "user" | "assistant" | "tool";
	content?: string | ContentPart[] | null;
	name?: string;
	reasoning_content?: string | null;
	tool_calls?: ToolCall[] | null;
	tool_call_id?: string | null;
	/** False: this reply is not trained. */
	train?: boolean;
	/** Weight of this reply's tokens in the loss; absent: 1. */
	weight?: number;
}

/** A value by MESSAGE INDEX. Keys may be numbers or strings: JSON knows only strings. */
export type ByMessage<T> = Record<number | string, T>;

/**
 * One training row. `scores`, `advantages`, `created_at_step` and `logprobs` say by message index which replies are to be
 * trained and with what standing; without `advantages` every assistant message is trained.
 */
export interface RecordData {
	messages: ChatMessage[];
	/** JSON schemas of the tools on offer. */
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
