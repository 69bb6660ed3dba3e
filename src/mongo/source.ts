/**
 * Documents of a database as a source of rows: reads them in batches by `_id`, resolves links batch by batch, and returns each
 * row as the JSON text that a file would have. Problems name the collection and `_id`.
 */
import { type ConvertRecordToData, convertOne } from "../data/sources/convert.js";
import type { AnySource, RowContent } from "../data/sources/source.js";
import {
	type BsonValue,
	bsonKind,
	bsonText,
	DocumentProblem,
	driverValue,
	get,
	inKey,
	isArray,
	isNothing,
	itemsOf,
	valueKey,
} from "./bson-json.js";
import type { MongoConnection } from "./connection.js";
import { fetchByIds, idText, type Link, Linked, readLink } from "./links.js";
import { listIdentity, type Snapshot } from "./snapshot.js";
import { recordDataRow, recordRows } from "./to-rows.js";

/** Linked documents that are fetched together; those of one record are never split. */
const LINKS_TOGETHER = 256;
/** A larger trajectory is refused: it would not fit into memory with others. */
const MAX_RECORD_BYTES = 256 * 1024 * 1024;
/** Assumed size of a row before any was read: the first batches are small, in case documents are large. */
const FIRST_ESTIMATE = 1024 * 1024;

/** A record with parsed links that are not yet followed. */
interface Pending {
	document: BsonValue;
	task: Link | null;
	traj: Link[];
}

/** The rows of a document as JSON text, or why it has none. */
type Converted = string[] | DocumentProblem;

/** Rows of a snapshot. */
export class DatabaseRows implements AnySource {
	readonly name: string;
	readonly blankLines = 0;
	readonly identity: string;
	readonly length: number;
	/** The first row of each document, and the total; null: each document is one row. */
	private readonly starts: Uint32Array | null;
	private estimate = FIRST_ESTIMATE;

	constructor(
		readonly connection: MongoConnection,
		readonly snapshot: Snapshot,
		private readonly convert: ConvertRecordToData | null,
	) {
		const { documents, collection } = snapshot;
		this.name = `${connection.address}.${collection}`;
		this.identity = listIdentity(snapshot);
		const starts = new Uint32Array(documents.length + 1);
		let single = true;
		for (let i = 0; i < documents.length; i++) {
			const { rows } = documents.at(i);
			if (rows !== 1) single = false;
			starts[i + 1] = (starts[i] as number) + rows;
		}
		this.length = starts[documents.length] as number;
		this.starts = single ? null : starts;
	}

	/** The document that a row comes from, by its number in the list. */
	documentOf(row: number): number {
		if (this.starts === null) return row;
		let low = 0;
		let high = this.starts.length - 2;
		while (low < high) {
			const middle = (low + high + 1) >> 1;
			if ((this.starts[middle] as number) <= row) low = middle;
			else high = middle - 1;
		}
		return low;
	}

	location(row: number): string {
		const document = this.documentOf(row);
		const { id, rows } = this.snapshot.documents.at(document);
		const part = rows > 1 ? ` (row ${row - (this.starts?.[document] ?? row) + 1} of ${rows})` : "";
		return `${this.snapshot.collection} ${idText(id)}${part}`;
	}

	/** An estimate from the rows read so far: the size of a document is unknown until it is read. */
	bytes(_row: number): number {
		return this.estimate;
	}

	async read(indexes: ArrayLike<number>): Promise<RowContent[]> {
		const rows = Array.from(indexes);
		const wanted = [...new Set(rows.map((row) => this.documentOf(row)))];
		const converted = await this.convertDocuments(wanted);
		const contents = rows.map((row): RowContent => {
			const document = this.documentOf(row);
			const found = converted.get(document);
			if (!Array.isArray(found)) {
				return {
					reason: found?.reason ?? "deleted",
					message: found?.message ?? "the document does not exist any more",
				};
			}
			const { rows: expected } = this.snapshot.documents.at(document);
			const text = found[row - (this.starts?.[document] ?? row)];
			if (found.length !== expected || text === undefined) {
				const message = `the record yields ${found.length} rows now, and yielded ${expected} when the run began`;
				return { reason: "changed", message };
			}
			return Buffer.from(text);
		});
		this.learn(contents);
		return contents;
	}

	private learn(contents: RowContent[]): void {
		let bytes = 0;
		let count = 0;
		for (const content of contents) {
			if (!(content instanceof Uint8Array)) continue;
			bytes += content.length;
			count += 1;
		}
		// Grows at once and shrinks slowly: a batch that is too large costs memory, one that is too small little time.
		if (count > 0) this.estimate = Math.max(256, Math.round(bytes / count), Math.round(this.estimate / 4));
	}

	/** How many rows each document yields; 1 if it cannot be a row, so that it is reported as one. */
	async countRows(documents: number[]): Promise<number[]> {
		const converted = await this.convertDocuments(documents);
		return documents.map((document) => {
			const found = converted.get(document);
			return Array.isArray(found) ? found.length : 1;
		});
	}

	private async convertDocuments(wanted: number[]): Promise<Map<number, Converted>> {
		const { collection, documents } = this.snapshot;
		const byKey = new Map(wanted.map((index) => [valueKey(documents.at(index).id), index]));
		const ids = wanted.map((index) => driverValue(documents.at(index).id));
		const found = await fetchByIds(this.connection, this.connection.db.collection(collection), ids);
		const converted = new Map<number, Converted>();
		const pending = new Map<number, Pending>();
		for (const [key, document] of found) {
			const index = byKey.get(key);
			if (index === undefined) continue;
			const result = guarded(() => (collection === "Record" ? this.readLinks(document) : [recordDataRow(document)]));
			if (result instanceof DocumentProblem || Array.isArray(result)) converted.set(index, result);
			else pending.set(index, result);
		}
		for (const group of groups(pending)) await this.convertRecords(group, converted);
		return converted;
	}

	private readLinks(document: BsonValue): Pending {
		const task = get(document, "task");
		const traj = get(document, "traj");
		if (!isArray(traj)) throw new DocumentProblem("wrong type", `\`traj\`: ${bsonKind(traj)}, not an array of links`);
		return {
			document,
			task: isNothing(task) ? null : inKey("task", () => readLink(task, "Task")),
			traj: itemsOf(traj).map((item, i) => inKey(`traj[${i}]`, () => this.readSampleLink(item, document))),
		};
	}

	private readSampleLink(item: BsonValue, document: BsonValue): Link {
		const link = readLink(item, "DispatchedSamplingTask");
		const own = get(document, "_id");
		const collection = link.kind === "reference" ? link.collection : "";
		if (
			link.kind === "reference" &&
			collection === "Record" &&
			own !== undefined &&
			valueKey(own) === valueKey(link.id)
		) {
			throw new DocumentProblem("cycle of links", "leads back to this record");
		}
		return link;
	}

	private async convertRecords(group: Map<number, Pending>, converted: Map<number, Converted>): Promise<void> {
		const records = [...group.values()];
		const samples = await Linked.fetch(
			this.connection,
			records.flatMap(({ traj }) => traj),
		);
		// Of a task only its scores are needed; its other fields may be large.
		const tasks = await Linked.fetch(
			this.connection,
			records.flatMap(({ task }) => task ?? []),
			{ scores: 1 },
		);
		for (const [index, record] of group) {
			const result = await guardedAsync(async () => this.rowsOf(record, samples, tasks));
			converted.set(index, result);
		}
	}

	private async rowsOf(record: Pending, linkedSamples: Linked, linkedTasks: Linked): Promise<string[]> {
		let bytes = 0;
		const samples = record.traj.map((link, i) =>
			inKey(`traj[${i}]`, () => {
				const sample = linkedSamples.follow(link);
				bytes += sample.end - sample.at;
				checkSample(sample, record.document);
				return sample;
			}),
		);
		if (bytes > MAX_RECORD_BYTES) {
			const message = `the ${samples.length} samples of the trajectory have ${Math.round(bytes / 2 ** 20)} MiB together; at most ${MAX_RECORD_BYTES / 2 ** 20} MiB are read`;
			throw new DocumentProblem("row too large", message);
		}
		if (this.convert !== null) return convertWith(this.convert, record.document, samples);
		const { task } = record;
		const linked = task === null ? undefined : inKey("task", () => linkedTasks.follow(task));
		return recordRows({ record: record.document, task: linked, samples });
	}

	async close(): Promise<void> {
		await this.connection.close();
	}
}

/** Throws if a link leads to a record instead of a sample. */
function checkSample(sample: BsonValue, record: BsonValue): void {
	const traj = get(sample, "traj");
	if (!isArray(traj) || get(sample, "request") !== undefined) return;
	const own = get(record, "_id");
	const back = itemsOf(traj).some((item) => {
		const link = readLink(item, "DispatchedSamplingTask");
		return link.kind === "reference" && own !== undefined && valueKey(link.id) === valueKey(own);
	});
	const id = get(sample, "_id");
	const name = id === undefined ? "a record" : `the record ${idText(id)}`;
	if (back) throw new DocumentProblem("cycle of links", `leads to ${name}, which links back to this one`);
	throw new DocumentProblem("wrong type", `leads to ${name}, which is not a sample`);
}

/** Records in groups whose links are fetched together. */
function* groups(pending: Map<number, Pending>): Generator<Map<number, Pending>> {
	let group = new Map<number, Pending>();
	let links = 0;
	for (const [index, record] of pending) {
		if (group.size > 0 && links + record.traj.length > LINKS_TOGETHER) {
			yield group;
			group = new Map();
			links = 0;
		}
		group.set(index, record);
		links += record.traj.length;
	}
	if (group.size > 0) yield group;
}

async function convertWith(convert: ConvertRecordToData, record: BsonValue, samples: BsonValue[]): Promise<string[]> {
	const made = await convertOne(convert, {
		record: JSON.parse(bsonText(record)),
		trajectory: samples.map((sample) => JSON.parse(bsonText(sample))),
	});
	return made.map((row) => {
		if (!(row instanceof Uint8Array)) throw new DocumentProblem(row.reason, row.message);
		return Buffer.from(row).toString();
	});
}

function guarded<T>(action: () => T): T | DocumentProblem {
	try {
		return action();
	} catch (error) {
		if (error instanceof DocumentProblem) return error;
		throw error;
	}
}

async function guardedAsync<T>(action: () => Promise<T>): Promise<T | DocumentProblem> {
	try {
		return await action();
	} catch (error) {
		if (error instanceof DocumentProblem) return error;
		throw error;
	}
}
