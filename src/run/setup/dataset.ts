/**
 * From the options and what code gives to one source of rows: files, a data set, a database, several of them, or what a user's
 * function makes of them.
 */
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
import type { CommitHooks } from "../loop/commit-hooks.js";
import { cacheDir, checkRowsGiven, RUN_FOLDER, samplesOfStep } from "./options.js";
import { needsAllRows } from "./plan.js";

/** Rows and functions that come from code. */
export interface RowsFromCode {
	dataset: Dataset<unknown> | null;
	convert: ConvertRecordToData<never> | null;
}

/** Rows of a run. */
export interface OpenRows {
	source: AnySource;
	/** Rows of each entry: of those of `train_file`, of a data set, of a database. What weights and caps refer to. */
	entryRows: number[];
	/** What a resumed run must know its rows by where they lie nowhere; null: they are known by their content. */
	datasetId: string | null;
	/** Where their tokens are kept: of rows that lie nowhere, in a folder of this run alone. */
	cacheFolder: string;
	/** What a user should know of how they are read. */
	notices: string[];
	/** Null: the rows come from where nobody needs to be told how the run goes. */
	hooks: CommitHooks | null;
	/** A resumed run finds nothing of what its earlier part has read. */
	unverified: boolean;
}

/** Rows that are made ahead of training at the least, and as many steps. */
const AHEAD_ROWS = 2048;
const AHEAD_STEPS = 4;

export interface OpenRowsInput {
	native: Native;
	args: AgentTrainingConfig;
	code: RowsFromCode;
	signal: AbortSignal | null;
	/** Of the run that goes on; null: it begins, or its rows are known by their content. */
	datasetId: string | null;
	/** The run that is gone on with: rows of a database must come again. Absent: nothing is trained. */
	resumed?: Resumable | null;
	/** Rows that could be trained as they come are read first too, so that they can be had more than once. */
	readFirst?: boolean;
	/** Called with the rows that were read first so far. */
	progress?: (rows: number) => void;
}

/** Opens all rows. The caller closes the source. */
export async function openRows(input: OpenRowsInput): Promise<OpenRows> {
	const { native, args, datasetId } = input;
	const { dataset, convert } = input.code;
	checkRowsGiven(args, dataset !== null);
	// Rows are claimed for training alone; whoever only looks sees those that are there.
	if (args.follow && input.resumed !== undefined) return openFollowed(input, input.resumed);
	const used: { id: string | null; folder: string; unverified: boolean } = {
		id: null,
		folder: cacheDir(args),
		unverified: false,
	};
	// On the disk that the checkpoints need anyway.
	const scratch = new Scratch(native, cacheDir(args));
	const reading = readingOptions(input, scratch, (identity, replayed) => {
		if (identity !== null && !replayed) return { identity: hashOf(`dataset ${identity}`), ledger: null };
		used.id = datasetId ?? randomBytes(8).toString("hex");
		used.folder = runFolder(args, used.id);
		const ledger = new RowHashes(join(used.folder, "rows.hashes"), args.on_bad_row === "skip");
		used.unverified = datasetId !== null && !ledger.found;
		return { identity: hashOf(`run ${used.id} ${identity ?? ""}`), ledger };
	});
	const mixed = args.train_weights.length > 0 || args.train_caps.length > 0;
	const uri = args.db_connection_string;
	// Rows beside others must be counted, and so must those that are mixed.
	const counted = mixed || uri !== null ? { ...reading, streamed: null } : reading;
	const parts: Opened[] = [];
	try {
		const hasOthers = args.train_file.length > 0 || dataset !== null;
		if (hasOthers && convert !== null) parts.push(await openThrough(native, args, dataset, convert, counted));
		else if (hasOthers) parts.push(await openPlain(native, args, dataset, counted));
		const hooks = uri === null ? null : await addDatabase(input, uri, parts);
		const { source, entryRows, notices } = together(parts);
		return {
			source,
			entryRows,
			notices,
			hooks,
			datasetId: used.id,
			cacheFolder: used.folder,
			unverified: used.unverified,
		};
	} catch (error) {
		await Promise.allSettled(parts.map(({ source }) => source.close()));
		throw error;
	} finally {
		scratch.close();
	}
}

/** Adds the rows of a database behind the others. */
async function addDatabase(input: OpenRowsInput, uri: string, parts: Opened[]): Promise<CommitHooks> {
	const { args, signal, resumed = null } = input;
	// The driver is loaded only by a run that needs it.
	const { DatabaseRun } = await import("../../mongo/database.js");
	const database = await DatabaseRun.open({
		args,
		uri,
		resumed: resumed && resumedList(args, resumed),
		// What a user's function takes is between its writer and the rows.
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

/** The rows of a database that is followed: a stream from the row on that the checkpoint has not trained. */
async function openFollowed({ args, code, signal }: OpenRowsInput, resumed: Resumable | null): Promise<OpenRows> {
	const uri = args.db_connection_string;
	if (uri === null || code.dataset !== null || code.convert !== null) {
		throw new ArlError(
			"ARL_CONFIG",
			"follow: the rows of a database alone are followed, as they are",
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
	// Which row has which number may change when the run goes on: tokens are of this part of it alone.
	await rm(cacheFolder, { recursive: true, force: true });
	const source = new StreamRows(run.rows(), {
		name: run.name,
		identity: hashOf(`follow ${run.id}`),
		length: args.max_steps * samples,
		open: true,
		first: run.firstRow,
		// What waits here is not there for other runs.
		ahead: samples,
		ledger: { note: () => {}, sync: () => run.sync(), close: () => {} },
		leftOut: () => 0,
	});
	const close = source.close.bind(source);
	source.close = async () => {
		await close();
		await run.close();
		await rm(cacheFolder, { recursive: true, force: true });
	};
	return {
		source,
		entryRows: [source.length],
		datasetId: run.id,
		cacheFolder,
		notices: [`${run.name} is followed: rows are trained as they come, and waited for`],
		hooks: {
			id: run.id,
			check: () => {},
			begin: () => run.begin(),
			beforeSave: () => run.beforeSave(),
			afterSave: (plan, step) => run.afterSave(plan, step),
			flush: () => run.flush(),
			end: () => run.end(),
			notices: () => run.notices(),
		},
		unverified: false,
	};
}

/** Where the list of a database's documents is found again. */
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

/** Rows of `train_file`, and behind them those of a data set. */
async function openPlain(
	native: Native,
	args: AgentTrainingConfig,
	dataset: Dataset<unknown> | null,
	reading: ReadingOptions,
): Promise<Opened> {
	const parts: Opened[] = [];
	try {
		if (args.train_file.length > 0) parts.push(await openTrainFiles(native, args, args.train_file, reading));
		if (dataset instanceof ParquetDataset) parts.push(await openParquetDataset(native, dataset, reading));
		else if (dataset !== null) {
			// Beside others the rows of a data set must be counted.
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

function openTrainFiles(
	native: Native,
	{ split, columns }: AgentTrainingConfig,
	entries: readonly string[],
	{ signal, scratch }: ReadingOptions,
): Promise<Opened> {
	return openFiles(native, entries, { split, columns, signal, scratch });
}

/** Its files are read as they are: rows that became objects would have lost the difference between 1 and 1.0. */
async function openParquetDataset(
	native: Native,
	{ file_paths, split, columns }: ParquetDataset,
	{ signal, scratch }: ReadingOptions,
): Promise<Opened> {
	const { source, notices } = await openFiles(native, file_paths, { split, columns, signal, scratch });
	return { source, entryRows: [source.length], notices };
}

async function openThrough(
	native: Native,
	args: AgentTrainingConfig,
	dataset: Dataset<unknown> | null,
	convert: ConvertRecordToData<never>,
	reading: ReadingOptions,
): Promise<Opened> {
	const raw: Convertible[] = [];
	const made: AnySource[] = [];
	const notices: string[] = [];
	const add = (opened: Opened) => {
		raw.push({ source: opened.source });
		notices.push(...opened.notices);
	};
	try {
		for (const entry of args.train_file) add(await openTrainFiles(native, args, [entry], reading));
		if (dataset instanceof ParquetDataset) add(await openParquetDataset(native, dataset, reading));
		else if (dataset !== null) raw.push({ dataset });
		if (reading.streamed !== null && Number.isFinite(reading.streamed)) {
			const source = closingToo(await openConverted(raw, convert, reading), raw);
			return { source, entryRows: [source.length], notices };
		}
		for (const part of raw) made.push(await openConverted([part], convert, reading));
		const [only] = made;
		const source = made.length === 1 && only ? only : new ConcatSource(made);
		await closeAll(raw);
		return { source, entryRows: made.map(({ length }) => length), notices };
	} catch (error) {
		await Promise.allSettled([closeAll(raw), ...made.map((source) => source.close())]);
		throw error;
	}
}

async function closeAll(raw: readonly Convertible[]): Promise<void> {
	await Promise.all(raw.map((part) => ("source" in part ? part.source.close() : undefined)));
}

/** A source that is read from others, and closes them with itself. */
function closingToo(source: AnySource, raw: readonly Convertible[]): AnySource {
	const close = source.close.bind(source);
	source.close = async () => {
		await close();
		await closeAll(raw);
	};
	return source;
}
