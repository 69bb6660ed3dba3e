/** From the options, and the caller's data set and function, to one source of rows: files, data set and database, converted or not. */
import { createHash, randomBytes } from "node:crypto";
import { rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import type { ConvertRecordToData } from "../../data/sources/convert.js";
import {
	type Convertible,
	type Dataset,
	openConverted,
	openDataset,
	type ReadingOptions,
} from "../../data/sources/custom.js";
import { openFiles } from "../../data/sources/open.js";
import { ParquetDataset } from "../../data/sources/parquet/dataset.js";
import { Scratch } from "../../data/sources/scratch.js";
import { type AnySource, ConcatSource, type RowContent } from "../../data/sources/source.js";
import { StreamRows } from "../../data/sources/stream.js";
import { RowHashes } from "../../data/tokens/row-hashes.js";
import { ArlError } from "../../errors.js";
import type { ResumedList } from "../../mongo/database.js";
import type { Native } from "../../native.js";
import type { Resumable } from "../checkpoint/checkpoint.js";
import { DATABASE_LIST } from "../checkpoint/state.js";
import type { EvalMetric } from "../eval/generation.js";
import type { CommitHooks } from "../loop/commit-hooks.js";
import { cutRows } from "./cut.js";
import { cacheDir, checkRowsGiven, RUN_FOLDER, samplesOfStep } from "./options.js";
import { needsAllRows } from "./plan.js";

/** Rows and functions that the caller gives, or that modules named in the options export. */
export interface RowsFromCode {
	dataset: Dataset<unknown> | null;
	convert: ConvertRecordToData<never> | null;
	/** Held-out rows; absent or null: `eval_file` alone names some. */
	evalDataset?: Dataset<unknown> | null;
	/** A metric of generated replies; absent or null: `eval_metric` alone names one. */
	evalMetric?: EvalMetric<never> | null;
}

/** Rows of a run. */
export interface OpenRows {
	source: AnySource;
	/** Number of rows of each entry: of `train_file`, the data set, the database. Weights and caps refer to them. */
	entryRows: number[];
	/** Id of a data set without identity, by which a resumed run finds its records; null: rows are identified by their content. */
	datasetId: string | null;
	/** Where the tokens are kept; those of a data set without identity in a folder of this run alone. */
	cacheFolder: string;
	/** For the user: how the rows are read. */
	notices: string[];
	/** Null: no source needs to know how the run proceeds. */
	hooks: CommitHooks | null;
	/** The run is resumed, and what its earlier part has read was not recorded. */
	unverified: boolean;
	/** The rows that `eval_split` has cut off; null: none. They are read from `source`, which must be open. */
	heldOut: AnySource | null;
}

/** How far ahead of training rows are generated: so many rows, or so many steps if that is more. */
const AHEAD_ROWS = 2048;
const AHEAD_STEPS = 4;

export interface OpenRowsInput {
	native: Native;
	args: AgentTrainingConfig;
	code: RowsFromCode;
	signal: AbortSignal | null;
	/** Of the run that is resumed; null: it starts, or its rows are known by their content. */
	datasetId: string | null;
	/** The run that is resumed: rows of a database must be the same. Absent: nothing is trained. */
	resumed?: Resumable | null;
	/** Rows that could be trained as they come are read first nevertheless, so that they can be read more than once. */
	readFirst?: boolean;
	/** Called with the number of rows read first so far. */
	progress?: (rows: number) => void;
}

/** Opens all rows. The caller closes the source. */
export async function openRows(input: OpenRowsInput): Promise<OpenRows> {
	const { native, args, datasetId } = input;
	const { dataset, convert } = input.code;
	checkRowsGiven(args, dataset !== null);
	// Only training leases rows; to look at rows, those of the moment are read.
	if (args.follow && input.resumed !== undefined) return openFollowed(input, input.resumed);
	const used: Pick<OpenRows, "datasetId" | "cacheFolder" | "unverified"> = {
		datasetId: null,
		cacheFolder: cacheDir(args),
		unverified: false,
	};
	// On the disk that the checkpoints need anyway.
	const scratch = new Scratch(native, cacheDir(args));
	const reading = readingOptions(input, scratch, (identity, replayed) => {
		if (identity !== null && !replayed) return { identity: hashOf(`dataset ${identity}`), ledger: null };
		used.datasetId = datasetId ?? randomBytes(8).toString("hex");
		used.cacheFolder = runFolder(args, used.datasetId);
		const ledger = new RowHashes(join(used.cacheFolder, "rows.hashes"), args.on_bad_row === "skip");
		used.unverified = datasetId !== null && !ledger.found;
		return { identity: hashOf(`run ${used.datasetId} ${identity ?? ""}`), ledger };
	});
	const cut = typeof args.eval_split === "number";
	const mixed = args.train_weights.length > 0 || args.train_caps.length > 0;
	const uri = args.db_connection_string;
	// Rows of several entries must be counted, and so must those that are mixed or cut.
	const counted = mixed || cut || uri !== null ? { ...reading, streamed: null } : reading;
	const parts: Opened[] = [];
	try {
		if (args.train_file.length > 0 || dataset !== null) {
			const open = convert === null ? openPlain(input, counted) : openThrough(input, convert, counted);
			parts.push(await open);
		}
		const hooks = uri === null ? null : await addDatabase(input, uri, parts);
		const { source, entryRows, notices } = together(parts);
		const { eval_split: share } = args;
		if (typeof share !== "number") return { source, entryRows, notices, hooks, heldOut: null, ...used };
		const cut = await cutRows(source, entryRows, { share, seed: args.data_seed ?? args.seed, signal: input.signal });
		return { ...cut, notices, hooks, ...used };
	} catch (error) {
		await Promise.allSettled(parts.map(({ source }) => source.close()));
		throw error;
	} finally {
		scratch.close();
	}
}

/** Adds the rows of a database after the others. */
async function addDatabase(input: OpenRowsInput, uri: string, parts: Opened[]): Promise<CommitHooks> {
	const { args, signal, resumed = null } = input;
	// The driver is loaded only by a run that needs it.
	const { DatabaseRun } = await import("../../mongo/database.js");
	const database = await DatabaseRun.open({
		args,
		uri,
		resumed: resumed && resumedList(args, resumed),
		// Which rows the function accepts is its author's business.
		convert: input.code.convert as ConvertRecordToData | null,
		signal,
	});
	const { rows } = database;
	const firstRow = parts.reduce((sum, { source }) => sum + source.length, 0);
	parts.push({ source: rows, entryRows: [rows.length], notices: [] });
	return {
		id: database.id,
		check: (plan) => database.check(plan, firstRow),
		begin: async () => database.begin(),
		beforeSave: () => database.beforeSave(),
		afterSave: (plan, step) => database.afterSave(plan, step, firstRow),
		flush: () => database.flush(),
		end: () => database.end(),
		notices: () => database.notices(),
	};
}

/** The rows of a database that is followed: a stream that begins with the first row after the checkpoint. */
async function openFollowed({ args, code, signal }: OpenRowsInput, resumed: Resumable | null): Promise<OpenRows> {
	const uri = args.db_connection_string;
	if (uri === null || code.dataset !== null || code.convert !== null) {
		throw new ArlError(
			"ARL_CONFIG",
			"follow: only the rows of a database are followed, and without converting",
			"Give db_connection_string, and neither a data set nor a converting function.",
		);
	}
	const { FollowRun } = await import("../../mongo/follow.js");
	const samples = samplesOfStep(args);
	const run = await FollowRun.open({
		args,
		uri,
		resumed: resumed && resumedList(args, resumed),
		step: resumed?.state.step ?? 0,
		samplesOfStep: samples,
		signal,
	});
	const cacheFolder = runFolder(args, run.id);
	// A resumed run may give the rows other numbers: the tokens are for this part of the run alone.
	await rm(cacheFolder, { recursive: true, force: true });
	const source = new StreamRows(run.rows(), {
		name: run.name,
		identity: hashOf(`follow ${run.id}`),
		length: args.max_steps * samples,
		open: true,
		first: run.firstRow,
		// Rows that wait here are missing for other runs.
		ahead: samples,
		ledger: { note: () => {}, sync: () => run.sync(), close: () => {} },
		leftOut: () => 0,
	});
	onClose(source, async () => {
		await run.close();
		await rm(cacheFolder, { recursive: true, force: true });
	});
	return {
		source,
		entryRows: [source.length],
		datasetId: run.id,
		cacheFolder,
		notices: [`${run.name} is followed: the run trains rows as they come, and waits for them`],
		hooks: run,
		unverified: false,
		heldOut: null,
	};
}

/** Where a resumed run finds its list of a database's documents. */
function resumedList(args: AgentTrainingConfig, { path, state }: Resumable): ResumedList | null {
	const id = state.fixed[DATABASE_LIST];
	return id === undefined ? null : { id, folders: [...new Set([dirname(path), args.output_dir])] };
}

function runFolder(args: AgentTrainingConfig, id: string): string {
	return join(cacheDir(args), `${RUN_FOLDER}${id}`);
}

function hashOf(text: string): string {
	return createHash("sha256").update(text).digest("hex");
}

function readingOptions(
	{ args, signal, readFirst = false, progress = () => {} }: OpenRowsInput,
	scratch: Scratch,
	about: ReadingOptions["about"],
): ReadingOptions {
	const inOrder = args.train_sampling_strategy === "sequential" && !needsAllRows(args);
	const needed = args.max_steps > 0 ? args.max_steps * samplesOfStep(args) : Number.POSITIVE_INFINITY;
	return {
		streamed: inOrder && !readFirst ? needed : null,
		most: inOrder && readFirst ? needed : Number.POSITIVE_INFINITY,
		progress,
		ahead: Math.max(AHEAD_ROWS, AHEAD_STEPS * samplesOfStep(args)),
		about,
		signal,
		scratch,
	};
}

/** Rows of some entries. */
type Opened = Pick<OpenRows, "source" | "entryRows" | "notices">;

/** The rows of `train_file`, followed by those of a data set. */
async function openPlain({ native, args, code }: OpenRowsInput, reading: ReadingOptions): Promise<Opened> {
	const { dataset } = code;
	const parts: Opened[] = [];
	try {
		if (args.train_file.length > 0) parts.push(await openNamed(native, args.train_file, args, reading));
		if (dataset instanceof ParquetDataset) parts.push(await openParquet(native, dataset, reading));
		else if (dataset !== null) {
			// Behind other rows those of a data set must be counted.
			const source = await openDataset(dataset, parts.length === 0 ? reading : { ...reading, streamed: null });
			parts.push({ source, entryRows: [source.length], notices: [] });
		}
		return together(parts);
	} catch (error) {
		await Promise.allSettled(parts.map(({ source }) => source.close()));
		throw error;
	}
}

function together(parts: readonly Opened[]): Opened {
	const [only] = parts;
	if (parts.length === 1 && only) return only;
	return {
		source: new ConcatSource<RowContent>(parts.map(({ source }) => source)),
		entryRows: parts.flatMap(({ entryRows }) => entryRows),
		notices: parts.flatMap(({ notices }) => notices),
	};
}

function openNamed(
	native: Native,
	entries: readonly string[],
	{ split, columns }: Pick<AgentTrainingConfig, "split" | "columns">,
	{ signal, scratch }: ReadingOptions,
): Promise<Opened> {
	return openFiles(native, entries, { split, columns, signal, scratch });
}

/** Reads the files themselves: rows that became objects would have lost the difference between 1 and 1.0. */
async function openParquet(native: Native, dataset: ParquetDataset, reading: ReadingOptions): Promise<Opened> {
	const { source, notices } = await openNamed(native, dataset.file_paths, dataset, reading);
	return { source, entryRows: [source.length], notices };
}

/** The rows that a function returns for those of `train_file` and of a data set. */
async function openThrough(
	{ native, args, code: { dataset } }: OpenRowsInput,
	convert: ConvertRecordToData<never>,
	reading: ReadingOptions,
): Promise<Opened> {
	const raw: Convertible[] = [];
	const converted: AnySource[] = [];
	const notices: string[] = [];
	const add = (opened: Opened) => {
		raw.push({ source: opened.source });
		notices.push(...opened.notices);
	};
	try {
		for (const entry of args.train_file) add(await openNamed(native, [entry], args, reading));
		if (dataset instanceof ParquetDataset) add(await openParquet(native, dataset, reading));
		else if (dataset !== null) raw.push({ dataset });
		if (reading.streamed !== null && Number.isFinite(reading.streamed)) {
			const source = await openConverted(raw, convert, reading);
			onClose(source, () => closeAll(raw));
			return { source, entryRows: [source.length], notices };
		}
		for (const part of raw) converted.push(await openConverted([part], convert, reading));
		const [only] = converted;
		const source = converted.length === 1 && only ? only : new ConcatSource(converted);
		await closeAll(raw);
		return { source, entryRows: converted.map(({ length }) => length), notices };
	} catch (error) {
		await Promise.allSettled([closeAll(raw), ...converted.map((source) => source.close())]);
		throw error;
	}
}

async function closeAll(raw: readonly Convertible[]): Promise<void> {
	await Promise.all(raw.map((part) => ("source" in part ? part.source.close() : undefined)));
}

/** Has something done after a source is closed. */
function onClose(source: AnySource, then: () => Promise<void>): void {
	const close = source.close.bind(source);
	source.close = async () => {
		await close();
		await then();
	};
}
