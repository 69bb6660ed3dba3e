/**
 * The list of a run's documents: scanned once, in the order of `_id`, and kept in the run's folder, so that a run that goes
 * on has the same rows whatever the database holds by then.
 */
import { createHash, randomBytes } from "node:crypto";
import { createReadStream } from "node:fs";
import { open, readdir, rm } from "node:fs/promises";
import { basename, join } from "node:path";
import { createInterface } from "node:readline";
import type { Document } from "mongodb";
import { makeFolder } from "../disk/folders.js";
import { PARTIAL, writeWhole } from "../disk/write-whole.js";
import { ArlError, toArlError } from "../errors.js";
import { type BsonValue, documentOf, driverValue, entries, numberOf } from "./bson-json.js";
import type { MongoConnection } from "./connection.js";
import { FOLDER } from "./folder.js";
import type { RowCollection, Selection } from "./selection.js";

const PAGE = 5_000;

/** One document of a list. */
export interface Listed {
	id: BsonValue;
	/** Rows that it gives. */
	rows: number;
	/** `trained_count` when the list was made. */
	trainedCount: number;
}

/** Documents in the order of their `_id`s, packed: some 25 bytes each. */
export class DocumentList {
	private types = new Uint8Array(1024);
	private ends = new Float64Array(1024);
	private rows = new Uint32Array(1024);
	private counts = new Uint32Array(1024);
	private ids = Buffer.alloc(16 * 1024);
	length = 0;

	push({ id, rows, trainedCount }: Listed): void {
		if (this.length === this.types.length) this.grow();
		const from = this.length === 0 ? 0 : (this.ends[this.length - 1] as number);
		const size = id.end - id.at;
		if (from + size > this.ids.length) {
			const ids = Buffer.alloc(Math.max(this.ids.length * 2, from + size));
			this.ids.copy(ids);
			this.ids = ids;
		}
		id.bytes.copy(this.ids, from, id.at, id.end);
		this.types[this.length] = id.type;
		this.ends[this.length] = from + size;
		this.rows[this.length] = rows;
		this.counts[this.length] = trainedCount;
		this.length += 1;
	}

	private grow(): void {
		const copy = <T extends Uint8Array | Uint32Array | Float64Array>(from: T, to: T): T => {
			to.set(from);
			return to;
		};
		const size = this.types.length * 2;
		this.types = copy(this.types, new Uint8Array(size));
		this.ends = copy(this.ends, new Float64Array(size));
		this.rows = copy(this.rows, new Uint32Array(size));
		this.counts = copy(this.counts, new Uint32Array(size));
	}

	at(index: number): Listed {
		const from = index === 0 ? 0 : (this.ends[index - 1] as number);
		return {
			id: { type: this.types[index] as number, bytes: this.ids, at: from, end: this.ends[index] as number },
			rows: this.rows[index] as number,
			trainedCount: this.counts[index] as number,
		};
	}

	/** Everything that the list holds. */
	bytes(): Uint8Array[] {
		const { length } = this;
		const size = length === 0 ? 0 : (this.ends[length - 1] as number);
		const arrays = [this.types, this.ends, this.rows, this.counts].map((array) => array.subarray(0, length));
		const views = arrays.map(({ buffer, byteOffset, byteLength }) => new Uint8Array(buffer, byteOffset, byteLength));
		return [...views, this.ids.subarray(0, size)];
	}

	setRows(index: number, rows: number): void {
		this.rows[index] = rows;
	}
}

/** A list with what it is a list of. */
export interface Snapshot {
	/** Of the run that made it: random, and part of the rows' identity. */
	id: string;
	/** Database within its server. */
	database: string;
	collection: RowCollection;
	documents: DocumentList;
}

/** The id of a new list. */
export const newListId = (): string => randomBytes(8).toString("hex");

/** BSON's order of types in an index; a range of `_id` holds values of one of these groups only. */
const TYPE_ORDER = [[10], [1, 16, 18, 19], [2, 14], [3], [5], [7], [8], [9], [17], [11]];

/** What is read of a document: how often it was trained, and whether it may give more than one row. */
const PROJECTIONS: Readonly<Record<RowCollection, Document>> = {
	DBRecordData: { _id: 1, trained_count: 1 },
	Record: { _id: 1, trained_count: 1, links: { $cond: [{ $isArray: "$traj" }, { $size: "$traj" }, 0] } },
};

/** What lies behind a document in the order of `_id`; behind none: all. */
export function behind(id: BsonValue | null): Document {
	if (id === null) return {};
	// `$gt` compares within one type: ids of the types that come later in the order lie behind too.
	const later = TYPE_ORDER.slice(TYPE_ORDER.findIndex((group) => group.includes(id.type)) + 1).flat();
	const greater = { _id: { $gt: driverValue(id) } };
	return later.length === 0 ? greater : { $or: [greater, { _id: { $type: later } }] };
}

/**
 * Scans the `_id`s of a selection with one cursor; where it breaks another one goes on behind the last `_id`. `several`:
 * called with the number of each document that may give more than one row.
 */
export async function scan(
	connection: MongoConnection,
	{ collection, filter }: Selection,
	several: (index: number) => void,
): Promise<Snapshot> {
	const documents = new DocumentList();
	const options = { raw: true, projection: PROJECTIONS[collection], batchSize: PAGE };
	await connection.attempt("listing documents", async () => {
		const last = documents.length > 0 ? documents.at(documents.length - 1).id : null;
		const wanted = { $and: [filter, behind(last)] };
		const cursor = connection.db.collection(collection).find(wanted, options).sort({ _id: 1 });
		try {
			let more = cursor.hasNext();
			while (await more) {
				const page = cursor.readBufferedDocuments();
				// The server puts the next page together while this one is read.
				more = cursor.hasNext();
				more.catch(() => {});
				for (const bytes of page) {
					let id: BsonValue | undefined;
					let trainedCount = 0;
					for (const [key, value] of entries(documentOf(bytes as unknown as Uint8Array))) {
						if (key === "_id") id = value;
						else if (key === "trained_count") trainedCount = Math.max(0, numberOf(value) ?? 0);
						else if ((numberOf(value) ?? 0) > 1) several(documents.length);
					}
					if (id !== undefined) documents.push({ id, rows: 1, trainedCount });
				}
			}
		} finally {
			await cursor.close().catch(() => {});
		}
	});
	return { id: newListId(), database: connection.db.databaseName, collection, documents };
}

/** Changes with the run and with every document of the list. */
export function identityOf(snapshot: Snapshot): string {
	const hash = createHash("sha256").update(`${snapshot.id} ${snapshot.database} ${snapshot.collection}\n`);
	for (const part of snapshot.documents.bytes()) hash.update(part);
	return hash.digest("hex");
}

/** A document as a line of a file. */
export function lineOf({ id, rows, trainedCount }: Listed): string {
	return `${id.type} ${id.bytes.toString("hex", id.at, id.end)} ${rows} ${trainedCount}\n`;
}

/** The document of a line. */
export function listedIn(line: string): Listed {
	const [type = "", hex = "", rows = "", count = ""] = line.split(" ");
	const bytes = Buffer.from(hex, "hex");
	return {
		id: { type: Number(type), bytes, at: 0, end: bytes.length },
		rows: Number(rows),
		trainedCount: Number(count),
	};
}

function* linesOf(documents: DocumentList): Generator<string> {
	for (let i = 0; i < documents.length; i++) yield lineOf(documents.at(i));
}

const pathOf = (folder: string, id: string) => join(folder, FOLDER, `${id}.ids`);

/** Writes a list into the run's folder, and removes those of runs that were there before. */
export async function keepSnapshot(folder: string, snapshot: Snapshot): Promise<void> {
	const place = join(folder, FOLDER);
	try {
		await makeFolder(place);
		await writeWhole(pathOf(folder, snapshot.id), async (partial) => {
			const file = await open(partial, "w");
			try {
				const { id, database, collection, documents } = snapshot;
				let pending = `${JSON.stringify({ version: 1, id, database, collection, documents: documents.length })}\n`;
				for (const line of linesOf(documents)) {
					pending += line;
					if (pending.length < 1 << 20) continue;
					await file.appendFile(pending);
					pending = "";
				}
				await file.appendFile(pending);
			} finally {
				await file.close();
			}
		});
		await removeOtherLists(place, `${snapshot.id}.ids`);
	} catch (error) {
		throw toArlError(error);
	}
}

/** Removes the lists of runs that were in this folder before. */
export async function removeOtherLists(place: string, kept: string): Promise<void> {
	for (const name of await readdir(place)) {
		if (/\.(ids|claims)$/.test(basename(name, PARTIAL)) && name !== kept) await rm(join(place, name), { force: true });
	}
}

/**
 * The list of the run with this id, from the first of `folders` that has it.
 *
 * @throws ArlError `ARL_STATE` where none has, or the file is damaged.
 */
export async function readSnapshot(folders: readonly string[], id: string): Promise<Snapshot> {
	for (const folder of folders) {
		const path = pathOf(folder, id);
		try {
			return await readList(path);
		} catch (error) {
			if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw toArlError(error);
		}
	}
	throw new ArlError(
		"ARL_STATE",
		`the list of this run's documents is missing: ${folders.map((folder) => pathOf(folder, id)).join(", nor ")}`,
		"It is stored next to the checkpoints; without it the same rows cannot be found again. Copy it back, or start from scratch with another output_dir and the checkpoint as model_name_or_path.",
	);
}

async function readList(path: string): Promise<Snapshot> {
	const damaged = new ArlError(
		"ARL_STATE",
		`${path}: the list of this run's documents is damaged`,
		"Copy it back, or start from scratch with another output_dir.",
	);
	let header: (Omit<Snapshot, "documents"> & { version: number; documents: number }) | null = null;
	const documents = new DocumentList();
	for await (const line of createInterface({ input: createReadStream(path), crlfDelay: Number.POSITIVE_INFINITY })) {
		if (header === null) {
			try {
				header = JSON.parse(line);
			} catch {
				throw damaged;
			}
			if (header?.version !== 1) throw damaged;
			continue;
		}
		documents.push(listedIn(line));
	}
	if (header === null || documents.length !== header.documents) throw damaged;
	return { id: header.id, database: header.database, collection: header.collection, documents };
}
