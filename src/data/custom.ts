/**
 * A data set from code as a source: any iterable or async iterable of rows, or `{ length, get(i) }`.
 * Its rows are written once, in its order, into a spool file without a name; from then on they are a file's rows.
 */
import { mkdtemp, open, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ArlError, toArlError } from "../errors.js";
import { openJsonl } from "./jsonl.js";
import type { RecordData } from "./record.js";
import type { Source } from "./source.js";

/** A data set with random access. */
export interface IndexedDataset {
	readonly length: number;
	get(index: number): RecordData | Promise<RecordData>;
}

/** What `train_dataset` may be. It must be finite. */
export type Dataset = Iterable<RecordData> | AsyncIterable<RecordData> | IndexedDataset;

const FLUSH_BYTES = 4 * 1024 * 1024;

function isIndexed(dataset: Dataset): dataset is IndexedDataset {
	return "get" in dataset && typeof dataset.get === "function" && "length" in dataset;
}

async function* rowsOf(dataset: Dataset): AsyncGenerator<RecordData> {
	if (isIndexed(dataset)) {
		for (let index = 0; index < dataset.length; index++) yield await dataset.get(index);
		return;
	}
	if (Symbol.asyncIterator in dataset || Symbol.iterator in dataset) {
		yield* dataset as AsyncIterable<RecordData>;
		return;
	}
	throw new ArlError(
		"ARL_CONFIG",
		"train_dataset: expected an iterable or async iterable of rows, or an object with length and get(i)",
	);
}

/** Spools a data set. Throws `ARL_DATA` for a row that is no object or cannot be written as JSON, by its index. */
export async function openDataset(dataset: Dataset, spoolDir = tmpdir()): Promise<Source> {
	const folder = await mkdtemp(join(spoolDir, "arl-rows-")).catch((error: unknown) => {
		throw toArlError(error);
	});
	try {
		const path = join(folder, "rows.jsonl");
		const file = await open(path, "w");
		let count = 0;
		try {
			let pending: string[] = [];
			let bytes = 0;
			for await (const row of rowsOf(dataset)) {
				const line = toLine(row, count);
				pending.push(line);
				bytes += line.length;
				count += 1;
				if (bytes >= FLUSH_BYTES) {
					await file.appendFile(pending.join(""));
					pending = [];
					bytes = 0;
				}
			}
			await file.appendFile(pending.join(""));
		} catch (error) {
			throw withRow(error, count);
		} finally {
			await file.close();
		}
		if (count === 0) throw new ArlError("ARL_DATA", "train_dataset: the data set has no rows");
		const source = await openJsonl(path, "train_dataset");
		return named(source);
	} finally {
		await rm(folder, { recursive: true, force: true });
	}
}

function toLine(row: unknown, index: number): string {
	if (typeof row !== "object" || row === null || Array.isArray(row)) {
		throw new ArlError("ARL_DATA", `train_dataset[${index}]: expected an object with messages, got ${describe(row)}`);
	}
	let line: string;
	try {
		line = JSON.stringify(row);
	} catch (error) {
		throw new ArlError(
			"ARL_DATA",
			`train_dataset[${index}]: cannot be written as JSON: ${error instanceof Error ? error.message : String(error)}`,
		);
	}
	return `${line}\n`;
}

function describe(value: unknown): string {
	if (value === null) return "null";
	return Array.isArray(value) ? "an array" : typeof value;
}

function withRow(error: unknown, index: number): unknown {
	if (error instanceof ArlError || (error instanceof Error && "syscall" in error)) return toArlError(error);
	const reason = error instanceof Error ? error.message : String(error);
	return new ArlError("ARL_DATA", `train_dataset[${index}]: the data set threw: ${reason}`, "", { cause: error });
}

/** Rows of code have an index, not a line. */
function named(source: Source): Source {
	return {
		name: source.name,
		length: source.length,
		blankLines: 0,
		identity: source.identity,
		location: (index) => `train_dataset[${index}]`,
		bytes: (index) => source.bytes(index),
		read: (indexes) => source.read(indexes),
		close: () => source.close(),
	};
}
