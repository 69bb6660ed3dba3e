/**
 * What the columns of a table (Parquet, CSV) hold by their names: in which of them text is JSON. Knows names only.
 */

import type { JsonBytes } from "./json-bytes.js";
import { isBlankText, isNestedJson } from "./json-scan.js";

/** Columns whose values are lists or objects; text in them is their JSON. */
const NESTED = [
	"messages",
	"conversations",
	"tools",
	"functions",
	"scores",
	"advantages",
	"created_at_step",
	"logprobs",
	"chat_template_kwargs",
	"input_ids",
	"labels",
];

/** Columns of images and the like: lists where text is one, else one address; bytes in them are the images themselves. */
const MEDIA = ["images", "image", "videos", "audios"];

/** Columns that are lists of objects; a list of texts in them is a list of their JSON. */
const LISTS_OF_OBJECTS = ["messages", "conversations", "tools", "functions"];

const NUMBERS = ["reward", "step"];

/** Names of columns in files by the names that the program has for them, as the option `columns` gives them. */
export type ColumnNames = Readonly<Record<string, string>>;

function has(known: readonly string[], column: string, names: ColumnNames): boolean {
	return known.some((name) => (Object.hasOwn(names, name) ? names[name] : name) === column);
}

/** Whether text in this column is the JSON of a list or object. */
export function holdsNested(column: string, names: ColumnNames): boolean {
	return has(NESTED, column, names) || holdsMedia(column, names);
}

/** Whether bytes in this column are no text. */
export function holdsMedia(column: string, names: ColumnNames): boolean {
	return has(MEDIA, column, names);
}

/** Whether each text of a list in this column is the JSON of an object. */
export function holdsObjects(column: string, names: ColumnNames): boolean {
	return has(LISTS_OF_OBJECTS, column, names);
}

/** Whether text in this column is a number. */
export function holdsNumber(column: string, names: ColumnNames): boolean {
	return has(NUMBERS, column, names);
}

/** The column that holds the conversation. */
export function isMessages(column: string, names: ColumnNames): boolean {
	return has(["messages"], column, names);
}

/** Names by which a line is known as the header of a table of rows. */
export const HEADER_NAMES: ReadonlySet<string> = new Set([
	...NESTED,
	...["prompt", "question", "problem", "instruction", "completion", "response", "output", "solution", "answer", "text"],
]);

const NULL = Buffer.from("null");

/**
 * The text of a column of lists or objects: as it stands where it is one, so that each digit stays; null where it is blank;
 * else a string, which is refused with the row's place where the row is parsed.
 */
export function writeNested(out: JsonBytes, text: Uint8Array): void {
	if (isNestedJson(text) || NULL.equals(text)) out.raw(text);
	else if (isBlankText(text)) out.null();
	else out.string(text);
}
