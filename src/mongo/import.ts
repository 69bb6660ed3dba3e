/**
 * Rows of files into AgentRL's collections, in batches. All rows are checked before the first is written. A row
 * that is there already, by its content, is left as it is: a repeated import doubles nothing, and one that was broken off
 * goes on. Ids ascend in the order of the rows, which is the order in which they are read back.
 */
import { BSON, MongoBulkWriteError, ObjectId } from "mongodb";
import { explainRow } from "../data/sources/explain.js";
import { RowProblem } from "../data/sources/json-value.js";
import { maxRowBytes, rowTooLarge } from "../data/sources/row-size.js";
import type { Source } from "../data/sources/source.js";
import type { BadRow } from "../data/tokens/problems.js";
import { ArlError } from "../errors.js";
import type { MongoConnection } from "./connection.js";
import { type CollectionName, MAX_DOCUMENT_BYTES, type Split } from "./documents.js";
import { HashCounts } from "./hash-counts.js";
import { type ReadRow, readRow, splitOf } from "./read-row.js";
import {
	type BsonDocument,
	hasToolsAsText,
	type ImportKind,
	identityOf,
	idIn,
	type Outgoing,
	rowDocuments,
	rowHash,
	setToolsAsText,
} from "./row-documents.js";

const READ_ROWS = 256;
const READ_BYTES = 8 * 1024 * 1024;
/** What is sent at once. */
const BATCH_DOCUMENTS = 1000;
const BATCH_BYTES = 16 * 1024 * 1024;
/** What is linked to is written before what links to it: a broken-off import leaves no link that leads nowhere. */
const ORDER: readonly CollectionName[] = ["Task", "DispatchedSamplingTask", "DBRecordData", "Record"];

export interface ImportOptions {
	source: Source;
	kind: ImportKind;
	/** The split of rows that name none; null: train. A row that names another one is refused. */
	split: Split | null;
	/** Hears how many rows are through. */
	progress?: (rows: number) => void;
}

/** What an import did. */
export interface ImportResult {
	/** Rows that are in the database now because of this import. */
	written: number;
	/** Rows that an earlier import had written. */
	present: number;
	/** Documents written, by collection. */
	documents: Partial<Record<CollectionName, number>>;
	/** Documents whose tools were written as text, because the server refuses their keys or 64 bits are too few. */
	toolsAsText: number;
}

/** A row on its way. */
interface RowInBatch {
	location: string;
	documents: Outgoing[];
}

/** Calls `use` on every row in order. */
async function eachRow(
	source: Source,
	skip: ReadonlySet<number>,
	use: (row: number, content: Uint8Array) => void | Promise<void>,
): Promise<void> {
	for (let next = 0; next < source.length; ) {
		const indexes: number[] = [];
		for (let bytes = 0; next < source.length && indexes.length < READ_ROWS && bytes < READ_BYTES; next++) {
			if (skip.has(next)) continue;
			indexes.push(next);
			bytes += source.bytes(next);
		}
		for (const [i, content] of (await source.read(indexes)).entries()) {
			await use(indexes[i] ?? 0, content);
		}
	}
}

/** A row and its split. Throws `RowProblem`. */
function read(content: Uint8Array, { split }: ImportOptions): { row: ReadRow; split: Split } {
	// What no run could read back is not written.
	if (content.length > maxRowBytes()) {
		const { reason, message } = rowTooLarge(content.length);
		throw new RowProblem(reason, message);
	}
	const row = readRow(content);
	const own = splitOf(row);
	if (own !== null && split !== null && own !== split) {
		throw new RowProblem("other split", `\`split\` is ${own}, and --split is ${split}`);
	}
	return { row, split: split ?? own ?? "train" };
}

/** What stands in a collection already: the hashes of its rows, and the first place behind them. */
async function standing(connection: MongoConnection, kind: ImportKind): Promise<{ hashes: HashCounts; place: number }> {
	return connection.attempt("looking at what is there", async () => {
		const hashes = new HashCounts();
		let place = 0;
		const ids = connection.db
			.collection(kind)
			.find({}, { projection: { _id: 1 } })
			.sort({ _id: 1 })
			.batchSize(10_000);
		for await (const { _id } of ids) {
			if (!(_id instanceof ObjectId)) continue;
			const identity = identityOf(_id);
			hashes.add(identity.hash);
			place = Math.max(place, identity.place + 1);
		}
		return { hashes, place };
	});
}

/** Looks at every row, and writes nothing: the rows that cannot be imported, and why. */
export async function checkRows(options: ImportOptions): Promise<BadRow[]> {
	const { source } = options;
	const bad: BadRow[] = [];
	const check = (row: number, content: Uint8Array) => {
		try {
			const { row: fields, split } = read(content, options);
			const identity = { hash: 0n, place: 0, copy: 0 };
			for (const { collection, document } of rowDocuments(fields, options.kind, split, identity)) {
				checkSize(collection, document);
			}
		} catch (error) {
			if (!(error instanceof RowProblem)) throw error;
			const message = explainRow(content, error.message) ?? error.message;
			bad.push({ row, location: source.location(row), reason: error.reason, message });
		}
	};
	await eachRow(source, new Set(), check);
	return bad;
}

function checkSize(collection: CollectionName, document: BsonDocument): void {
	const bytes = BSON.calculateObjectSize(document);
	if (bytes < MAX_DOCUMENT_BYTES) return;
	throw new RowProblem(
		"too large",
		`its ${collection} has ${bytes} bytes, and a document of MongoDB has fewer than ${MAX_DOCUMENT_BYTES}; images stay small as URLs`,
	);
}

/** Writes all rows but those in `skip` (which `checkRows` has found). Throws `ARL_DATA` for a row that the server refuses. */
export async function importRows(
	connection: MongoConnection,
	options: ImportOptions,
	skip: ReadonlySet<number> = new Set(),
): Promise<ImportResult> {
	const { source, kind, progress } = options;
	const writer = new Writer(connection, kind);
	const copies = new HashCounts();
	const { hashes, place: firstPlace } = await standing(connection, kind);
	// Behind the last place that four bytes can name there is none: then the rows keep their order among themselves.
	let place = firstPlace + source.length > 2 ** 32 ? 0 : firstPlace;
	let through = 0;
	const write = async (row: number, content: Uint8Array) => {
		const { row: fields, split } = read(content, options);
		const hash = rowHash(fields, kind, split);
		const copy = copies.add(hash);
		if (hashes.take(hash)) writer.result.present += 1;
		else {
			const documents = rowDocuments(fields, kind, split, { hash, place, copy });
			place += 1;
			await writer.add({ location: source.location(row), documents });
		}
		through += 1;
		if (through % READ_ROWS === 0) progress?.(through);
	};
	await eachRow(source, skip, write);
	await writer.flush();
	progress?.(through);
	return writer.result;
}

/** Collects rows and writes them together. */
class Writer {
	readonly result: ImportResult = { written: 0, present: 0, documents: {}, toolsAsText: 0 };
	private rows: RowInBatch[] = [];
	private documents = 0;
	private bytes = 0;

	constructor(
		private readonly connection: Pick<MongoConnection, "db" | "attempt" | "address">,
		private readonly kind: ImportKind,
	) {}

	async add(row: RowInBatch): Promise<void> {
		this.rows.push(row);
		this.documents += row.documents.length;
		for (const { document } of row.documents) this.bytes += BSON.calculateObjectSize(document);
		if (this.documents >= BATCH_DOCUMENTS || this.bytes >= BATCH_BYTES) await this.flush();
	}

	async flush(): Promise<void> {
		for (const collection of ORDER) {
			const waiting = this.rows.flatMap(({ location, documents }) =>
				documents.filter((outgoing) => outgoing.collection === collection).map((outgoing) => ({ location, outgoing })),
			);
			for (let from = 0; from < waiting.length; ) {
				// A row with many samples is more than a batch by itself.
				let to = from;
				for (let bytes = 0; to < waiting.length && to - from < BATCH_DOCUMENTS && bytes < BATCH_BYTES; to++) {
					bytes += BSON.calculateObjectSize(waiting[to]?.outgoing.document ?? new Map());
				}
				await this.insert(collection, waiting.slice(from, to));
				from = to;
			}
		}
		this.rows = [];
		this.documents = 0;
		this.bytes = 0;
	}

	private async insert(name: CollectionName, batch: { location: string; outgoing: Outgoing }[]): Promise<void> {
		const collection = this.connection.db.collection<{ _id: ObjectId }>(name);
		let written = batch.length;
		const present: ObjectId[] = [];
		const again: typeof batch = [];
		const errors = await this.send(
			name,
			batch.map(({ outgoing }) => outgoing.document),
		);
		for (const { index, code, message } of errors) {
			written -= 1;
			const entry = batch[index];
			if (entry === undefined) continue;
			if (code === 11000) present.push(idIn(entry.outgoing.document));
			else if (setToolsAsText(entry.outgoing)) again.push(entry);
			else throw this.refused(name, entry.location, message);
		}
		if (present.length > 0) {
			const found = await this.connection.attempt(`looking at ${name}`, () =>
				collection.find({ _id: { $in: present } }, { projection: { _id: 1 } }).toArray(),
			);
			if (found.length < present.length) {
				const known = new Set(found.map(({ _id }) => _id.toHexString()));
				const other = batch.find(({ outgoing }) => {
					const id = idIn(outgoing.document).toHexString();
					return !known.has(id) && present.some((one) => one.toHexString() === id);
				});
				const message = errors.find(({ code }) => code === 11000)?.message ?? "";
				throw this.refused(name, other?.location ?? "", `a unique index of this collection: ${message}`);
			}
		}
		this.result.documents[name] = (this.result.documents[name] ?? 0) + written;
		if (name === this.kind) {
			this.result.written += written;
			this.result.present += present.length;
		}
		this.result.toolsAsText += batch.filter((entry) => !again.includes(entry) && hasToolsAsText(entry.outgoing)).length;
		if (again.length > 0) await this.insert(name, again);
	}

	/** Inserts what is not there yet; the errors of single documents. */
	private send(name: CollectionName, documents: BsonDocument[]): Promise<Refusal[]> {
		const collection = this.connection.db.collection(name);
		return this.connection.attempt(`writing into ${name}`, async () => {
			try {
				await collection.insertMany(documents, { ordered: false });
				return [];
			} catch (error) {
				if (!(error instanceof MongoBulkWriteError)) throw error;
				const list = Array.isArray(error.writeErrors) ? error.writeErrors : [error.writeErrors];
				if (list.length === 0) throw error;
				return list.map(({ index, code, errmsg }) => ({ index, code, message: errmsg ?? "" }));
			}
		});
	}

	private refused(name: CollectionName, location: string, message: string): ArlError {
		return new ArlError(
			"ARL_DATA",
			`${location}: ${this.connection.address} refuses its ${name}: ${message}`,
			"The rows before it are in; correct the row and import again: nothing is doubled.",
		);
	}
}

interface Refusal {
	index: number;
	code: number | string | undefined;
	message: string;
}
