/**
 * Imports rows of files into AgentRL's collections, in batches. All rows are checked before the first is written. Rows whose
 * content is in the collection already are skipped: repeating an import duplicates nothing, and an interrupted one can be
 * resumed. Ids ascend in the order of the rows, which is the order in which they are read back.
 */
import { BSON, MongoBulkWriteError, ObjectId } from "mongodb";
import { explainRow } from "../data/sources/explain.js";
import { RowProblem } from "../data/sources/json-value.js";
import { maxRowBytes, rowTooLarge } from "../data/sources/row-size.js";
import { type AnySource, type RowContent, rowsInOrder } from "../data/sources/source.js";
import { type BadRow, badRowsError } from "../data/tokens/problems.js";
import { ArlError } from "../errors.js";
import type { MongoConnection } from "./connection.js";
import { type CollectionName, MAX_DOCUMENT_BYTES, type Split } from "./documents.js";
import { HashCounts } from "./hash-counts.js";
import { type ReadRow, readRow, splitOf } from "./read-row.js";
import {
	type BsonDocument,
	hasToolsAsText,
	type ImportKind,
	idIn,
	idParts,
	type Outgoing,
	rowDocuments,
	rowHash,
	setToolsAsText,
} from "./to-documents.js";

const PROGRESS_ROWS = 256;
/** Limits of one request. */
const BATCH_DOCUMENTS = 1000;
const BATCH_BYTES = 16 * 1024 * 1024;
/** Link targets are written before the documents that link to them, so that an interrupted import leaves no dangling links. */
const ORDER: readonly CollectionName[] = ["Task", "DispatchedSamplingTask", "DBRecordData", "Record"];

export interface ImportOptions {
	source: AnySource;
	kind: ImportKind;
	/** The split of rows that name none; null: train. Rows that name another one are refused. */
	split: Split | null;
	/** Called with the number of rows processed. */
	progress?: (rows: number) => void;
}

/** The result of an import. */
export interface ImportResult {
	/** Rows that this import has written. */
	written: number;
	/** Rows that were in the database already. */
	present: number;
	/** Documents written, by collection. */
	documents: Partial<Record<CollectionName, number>>;
	/** Documents whose tools are stored as text, because the server refuses their keys or they have integers beyond 64 bits. */
	toolsAsText: number;
}

/** A row in a batch. */
interface RowInBatch {
	location: string;
	documents: Outgoing[];
}

/** A row and its split. Throws `RowProblem`. */
function read(content: RowContent, { split }: ImportOptions): { row: ReadRow; split: Split } {
	if (!(content instanceof Uint8Array)) throw new RowProblem(content.reason, content.message);
	// Rows that no run could read back are not written.
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

/** What a collection contains already: the hashes of its rows, and the first free place after them. */
async function existingRows(
	connection: MongoConnection,
	kind: ImportKind,
): Promise<{ hashes: HashCounts; place: number }> {
	return connection.attempt("reading existing ids", async () => {
		const hashes = new HashCounts();
		let place = 0;
		const ids = connection.db
			.collection(kind)
			.find({}, { projection: { _id: 1 } })
			.sort({ _id: 1 })
			.batchSize(10_000);
		for await (const { _id } of ids) {
			if (!(_id instanceof ObjectId)) continue;
			const identity = idParts(_id);
			hashes.add(identity.hash);
			place = Math.max(place, identity.place + 1);
		}
		return { hashes, place };
	});
}

/** Checks every row without writing: returns the rows that cannot be imported, and why. */
export async function checkImport(options: ImportOptions): Promise<BadRow[]> {
	const { source } = options;
	const bad: BadRow[] = [];
	for await (const { row, content } of rowsInOrder(source)) {
		try {
			const { row: fields, split } = read(content, options);
			const identity = { hash: 0n, place: 0, copy: 0 };
			for (const { collection, document } of rowDocuments(fields, options.kind, split, identity)) {
				checkSize(collection, document);
			}
		} catch (error) {
			if (!(error instanceof RowProblem)) throw error;
			const better = content instanceof Uint8Array ? explainRow(content, error.message) : null;
			const message = better ?? error.message;
			bad.push({ row, location: source.location(row), reason: error.reason, message });
		}
	}
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

/** Writes all rows except those in `skip`, which `checkImport` has found. Throws `ARL_DATA` for a row that the server refuses. */
export async function importRows(
	connection: MongoConnection,
	options: ImportOptions,
	skip: ReadonlySet<number> = new Set(),
): Promise<ImportResult> {
	const { source, kind, progress } = options;
	const writer = new Writer(connection, kind);
	const copies = new HashCounts();
	const { hashes, place: firstPlace } = await existingRows(connection, kind);
	// If the places after the last one do not fit into four bytes, the new rows keep only their order among themselves.
	let place = firstPlace + source.length > 2 ** 32 ? 0 : firstPlace;
	let through = 0;
	for await (const { row, content } of rowsInOrder(source, skip)) {
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
		if (through % PROGRESS_ROWS === 0) progress?.(through);
	}
	await writer.flush();
	progress?.(through);
	return writer.result;
}

/**
 * Checks all rows, and writes them, or with `skip` those that can be imported.
 *
 * @throws ArlError `ARL_DATA` if a row cannot be imported, or with `skip` if none can.
 */
export async function importChecked(
	connection: MongoConnection,
	options: ImportOptions,
	skip: boolean,
): Promise<ImportResult & { bad: BadRow[] }> {
	const { source } = options;
	const bad = await checkImport(options);
	if (bad.length > 0 && !skip) throw badRowsError(bad, source.length);
	if (bad.length === source.length) throw new ArlError("ARL_DATA", `${source.name}: no row can be imported`);
	return { ...(await importRows(connection, options, new Set(bad.map(({ row }) => row)))), bad };
}

/** Writes rows in batches. */
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
				// A row with many samples may be larger than a batch.
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

	/** Inserts the documents that do not exist yet; returns the errors of single documents. */
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
			"The rows before it are imported; correct the row and import again: nothing is duplicated.",
		);
	}
}

interface Refusal {
	index: number;
	code: number | string | undefined;
	message: string;
}
