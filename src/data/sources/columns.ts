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

/** What columns that the program knows are called in the file. */
function inFile(known: readonly string[], names: ColumnNames): string[] {
	return known.map((name) => (Object.hasOwn(names, name) ? (names[name] as string) : name));
}

/** Whether text in this column is a JSON list or object. */
export function holdsNested(column: string, names: ColumnNames): boolean {
	return inFile([...NESTED, ...MEDIA], names).includes(column);
}

/** Whether text in this column is a number. */
export function holdsNumber(column: string, names: ColumnNames): boolean {
	return inFile(NUMBERS, names).includes(column);
}

/** The columns of a file by what the core must know of them to read it. */
export function columnsByMeaning(names: ColumnNames) {
	return {
		nested: inFile([...NESTED, ...MEDIA], names),
		media: inFile(MEDIA, names),
		objects: inFile(LISTS_OF_OBJECTS, names),
		messages: names.messages ?? "messages",
	};
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
