/**
 * Rows put together from columns: a tree of the file's types, each of which writes its part of a row as JSON. Whether a value
 * is null, a list is empty or neither follows from the definition level, where a list ends from the repetition level (Melnik
 * et al., "Dremel", 2010).
 */
import type { SchemaElement } from "hyparquet";
import { type ColumnNames, holdsMedia, holdsNested, holdsObjects, isMessages } from "../columns.js";
import { type JsonBytes, keyBytes } from "../json-bytes.js";
import { Leaf } from "./leaf.js";
import type { Remarks } from "./remarks.js";
import { isBinary, isText, valueWriter, type WriteValue, writeJson, writeNestedText } from "./values.js";

/** An element of the file's schema with those below it. */
export interface SchemaNode {
	element: SchemaElement;
	children: SchemaNode[];
}

/** What writes one value of a row, its entries being the next ones of its columns. */
export abstract class Node {
	readonly first: Leaf;

	constructor(
		readonly leaves: Leaf[],
		/** Definition level from which on it is there; below, it is null. */
		readonly level: number,
	) {
		const [first] = leaves;
		if (!first) throw new Error("a group without columns");
		this.first = first;
	}

	/** Writes the value, which is not null. */
	abstract write(out: JsonBytes): void;

	get isNull(): boolean {
		return this.first.level() < this.level;
	}

	/** Passes over a value that is null or an empty list. */
	skip(): void {
		for (const leaf of this.leaves) leaf.skip();
	}

	writeOrNull(out: JsonBytes): void {
		if (this.isNull) {
			this.skip();
			out.null();
		} else this.write(out);
	}
}

class Value extends Node {
	constructor(
		private readonly leaf: Leaf,
		level: number,
		private readonly writeValue: WriteValue,
	) {
		super([leaf], level);
	}

	write(out: JsonBytes): void {
		const value = this.leaf.take();
		try {
			this.writeValue(out, value);
		} catch (error) {
			throw this.leaf.damaged(error);
		}
	}
}

class Struct extends Node {
	private readonly keys: Buffer[];

	constructor(
		private readonly fields: { name: string; node: Node; keepNull: boolean }[],
		level: number,
		private readonly column: string,
		private readonly remarks: Remarks,
	) {
		super(
			fields.flatMap(({ node }) => node.leaves),
			level,
		);
		this.keys = fields.map(({ name }) => keyBytes(name));
	}

	write(out: JsonBytes): void {
		out.byte(0x7b);
		let some = false;
		let left = 0;
		for (const [i, { node, keepNull }] of this.fields.entries()) {
			if (!keepNull && node.isNull) {
				node.skip();
				left += 1;
				continue;
			}
			if (some) out.byte(0x2c);
			some = true;
			out.raw(this.keys[i] as Buffer);
			node.writeOrNull(out);
		}
		out.byte(0x7d);
		if (left > 0) this.remarks.leftOut(this.column, left);
	}
}

/** An image as Hugging Face's datasets store it, `{bytes, path}`: the bytes as a data URL, else the path. */
class HubImage extends Node {
	constructor(
		private readonly bytes: Node,
		private readonly path: Node,
		level: number,
	) {
		super([...bytes.leaves, ...path.leaves], level);
	}

	write(out: JsonBytes): void {
		if (this.bytes.isNull) {
			this.bytes.skip();
			this.path.writeOrNull(out);
			return;
		}
		this.bytes.write(out);
		if (this.path.isNull) this.path.skip();
		else this.path.first.take();
	}
}

class List extends Node {
	constructor(
		private readonly item: Node,
		level: number,
		/** Definition level of a list that has an item. */
		private readonly itemLevel: number,
		private readonly repetition: number,
	) {
		super(item.leaves, level);
	}

	write(out: JsonBytes): void {
		out.byte(0x5b);
		if (this.first.level() < this.itemLevel) this.skip();
		else {
			this.item.writeOrNull(out);
			while (this.first.next() === this.repetition) {
				out.byte(0x2c);
				this.item.writeOrNull(out);
			}
		}
		out.byte(0x5d);
	}
}

/** A map as an object; keys that are no strings are written as the text of the value. */
class MapNode extends Node {
	constructor(
		private readonly key: Node,
		private readonly value: Node,
		level: number,
		private readonly itemLevel: number,
		private readonly repetition: number,
	) {
		super([...key.leaves, ...value.leaves], level);
	}

	write(out: JsonBytes): void {
		out.byte(0x7b);
		if (this.first.level() < this.itemLevel) this.skip();
		else {
			this.entry(out);
			while (this.first.next() === this.repetition) {
				out.byte(0x2c);
				this.entry(out);
			}
		}
		out.byte(0x7d);
	}

	private entry(out: JsonBytes): void {
		const from = out.length;
		this.key.writeOrNull(out);
		// A key must be a string; a number's or a boolean's digits are ASCII.
		const written = out.written().subarray(from);
		if (written[0] !== 0x22) {
			const text = Buffer.from(written).toString("latin1");
			out.length = from;
			out.ascii(`"${text}"`);
		}
		out.byte(0x3a);
		this.value.writeOrNull(out);
	}
}

const LIST_ITEM_NAMES = /^array$|_tuple$/;

function isRepeated({ element }: SchemaNode): boolean {
	return element.repetition_type === "REPEATED";
}

/** Makes the tree of one file. */
export class TreeBuilder {
	readonly leaves: Leaf[] = [];

	constructor(
		private readonly names: ColumnNames,
		/** Top-level columns whose text is JSON, whatever their names. */
		private readonly json: ReadonlySet<string>,
		private readonly remarks: Remarks,
	) {}

	/** The node of a top-level column. */
	column(node: SchemaNode): Node {
		const name = node.element.name;
		return this.field(node, { path: [name], type: [name], definition: 0, repetition: 0 });
	}

	private field(node: SchemaNode, place: Place): Node {
		if (!isRepeated(node)) {
			const definition = place.definition + (node.element.repetition_type === "OPTIONAL" ? 1 : 0);
			return this.value(node, { ...place, definition });
		}
		// A repeated field that is in no list is a list by itself.
		const inner = { ...place, definition: place.definition + 1, repetition: place.repetition + 1 };
		const item = this.value(node, { ...inner, type: [...place.type, "[]"] });
		return new List(item, place.definition, inner.definition, inner.repetition);
	}

	/** What a field holds, its own repetition being counted in `place` already. */
	private value(node: SchemaNode, place: Place): Node {
		const { element, children } = node;
		if (children.length === 0) return this.leaf(node, place);
		const [only] = children;
		const kind = element.logical_type?.type ?? element.converted_type;
		if (children.length === 1 && only && isRepeated(only)) {
			if (kind === "LIST") return this.list(only, place);
			if ((kind === "MAP" || kind === "MAP_KEY_VALUE") && only.children.length === 2) return this.map(only, place);
		}
		return this.struct(node, place);
	}

	private list(repeated: SchemaNode, place: Place): Node {
		const inner: Place = {
			path: [...place.path, repeated.element.name],
			type: [...place.type, "[]"],
			definition: place.definition + 1,
			repetition: place.repetition + 1,
		};
		const [only] = repeated.children;
		// Lists of older writers have no level of their own for the item (the format's rules for compatibility).
		const wrapped = repeated.children.length === 1 && only && !LIST_ITEM_NAMES.test(repeated.element.name);
		const item = wrapped
			? this.field(only, { ...inner, path: [...inner.path, only.element.name] })
			: this.value(repeated, inner);
		return new List(item, place.definition, inner.definition, inner.repetition);
	}

	private map(repeated: SchemaNode, place: Place): Node {
		const path = [...place.path, repeated.element.name];
		const definition = place.definition + 1;
		const repetition = place.repetition + 1;
		const [key, value] = repeated.children.map((child) =>
			this.field(child, {
				path: [...path, child.element.name],
				type: [...place.type, "{}"],
				definition,
				repetition,
			}),
		);
		return new MapNode(key as Node, value as Node, place.definition, definition, repetition);
	}

	private struct({ children }: SchemaNode, place: Place): Node {
		const fields = children.map((child) => {
			const { name } = child.element;
			const node = this.field(child, { ...place, path: [...place.path, name], type: [...place.type, name] });
			return { name, node, keepNull: this.keepsNull(place.type, name) };
		});
		const [bytes, path] = ["bytes", "path"].map((wanted) => children.find(({ element }) => element.name === wanted));
		if (children.length === 2 && bytes && path && isBinary(bytes.element) && isText(path.element)) {
			const nodes = ["bytes", "path"].map((wanted) => fields.find(({ name }) => name === wanted)?.node as Node);
			return new HubImage(nodes[0] as Node, nodes[1] as Node, place.definition);
		}
		return new Struct(fields, place.definition, place.path[0] ?? "", this.remarks);
	}

	/** A message has its `content` even where that is null: OpenAI's API writes it so for a reply of tool calls. */
	private keepsNull(type: readonly string[], field: string): boolean {
		return field === "content" && type.length === 2 && type[1] === "[]" && isMessages(type[0] ?? "", this.names);
	}

	private leaf({ element }: SchemaNode, place: Place): Node {
		const leaf = new Leaf(place.path, {
			element,
			maxDefinition: place.definition,
			maxRepetition: place.repetition,
		});
		this.leaves.push(leaf);
		return new Value(leaf, place.definition, this.leafWriter(element, place.type));
	}

	private leafWriter(element: SchemaElement, type: readonly string[]): WriteValue {
		const [column = "", inner] = type;
		if (type.length === 1 && this.json.has(column) && isText(element)) return writeJson;
		const nested =
			(type.length === 1 && holdsNested(column, this.names)) ||
			(type.length === 2 && inner === "[]" && holdsObjects(column, this.names));
		const text = isText(element) || (isBinary(element) && !holdsMedia(column, this.names));
		if (nested && text) return writeNestedText;
		const write = valueWriter(element);
		if (element.type !== "FLOAT" && element.type !== "DOUBLE") return write;
		return (out, value) => {
			if (!Number.isFinite(value)) this.remarks.notFinite(column);
			write(out, value);
		};
	}
}

interface Place {
	/** As in the file's columns. */
	path: readonly string[];
	/** As a person reads the type: names, `[]` for a list's items, `{}` for a map's. */
	type: readonly string[];
	definition: number;
	repetition: number;
}
