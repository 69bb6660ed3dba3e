/**
 * What the columns of a table (Parquet, CSV) contain according to their names: in which of them text is JSON. Knows names only.
 */

import type { JsonBytes } from "./json-bytes.js";
import { isBlankText, isNestedJson } from "./json-scan.js";

/** Columns of lists or objects; text in them is JSON. */
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

/** Columns of images and other media: text is a JSON list or one URL; bytes are the media themselves. */
const MEDIA = ["images", "image", "videos", "audios"];

/** Columns of lists of objects; a list of strings in them is a list of JSON texts. */
const LISTS_OF_OBJECTS = ["messages", "conversations", "tools", "functions"];

const NUMBERS = ["reward", "step"];

/** Column names in the files by the program's names for them: the option `columns`. */
export type ColumnNames = Readonly<Record<string, string>>;

function has(known: readonly string[], column: string, names: ColumnNames): boolean {
	return known.some((name) => (Object.hasOwn(names, name) ? names[name] : name) === column);
}

/** Whether text in this column is a JSON list or object. */
export function holdsNested(column: string, names: ColumnNames): boolean {
	return has(NESTED, column, names) || holdsMedia(column, names);
}

/** Whether bytes in this column are binary data. */
export function holdsMedia(column: string, names: ColumnNames): boolean {
	return has(MEDIA, column, names);
}

/** Whether each string of a list in this column is a JSON object. */
export function holdsObjects(column: string, names: ColumnNames): boolean {
	return has(LISTS_OF_OBJECTS, column, names);
}

/** Whether text in this column is a number. */
export function holdsNumber(column: string, names: ColumnNames): boolean {
	return has(NUMBERS, column, names);
}

/** Whether this is the column of the conversation. */
export function isMessages(column: string, names: ColumnNames): boolean {
	return has(["messages"], column, names);
}

/** Names that identify a line as the header of a table of rows. */
export const HEADER_NAMES: ReadonlySet<string> = new Set([
	...NESTED,
	...["prompt", "question", "problem", "instruction", "completion", "response", "output", "solution", "answer", "text"],
]);

const NULL = Buffer.from("null");

/**
 * Writes the text of a column of lists or objects: unchanged if it is one, so that each digit stays; null if it is blank; else
 * as a string, which the row's parser refuses with the row's location.
 */
export function writeNested(out: JsonBytes, text: Uint8Array): void {
	if (isNestedJson(text) || NULL.equals(text)) out.raw(text);
	else if (isBlankText(text)) out.null();
	else out.string(text);
}
