/** One row as the model will see it: its tokens, which of them are trained, and with what weight. Writes nothing. */
import type { AgentTrainingConfig } from "../config/schema.js";
import { explainRow } from "../data/sources/explain.js";
import { Scratch } from "../data/sources/scratch.js";
import { type AnySource, takeRows } from "../data/sources/source.js";
import { type NoticedRows, noticedRows } from "../data/tokens/notes.js";
import { ArlError, toArlError } from "../errors.js";
import { type FetchProgress, localArgs } from "../hub/index.js";
import type { Native, NativeTextEncoder } from "../native.js";
import { openRows, type RowsFromCode } from "../run/setup/dataset.js";
import { readModelFolder } from "../run/setup/model.js";
import { textOptions } from "../run/setup/options.js";
import { detectShape } from "../run/setup/rows.js";
import { loadCode } from "../run/setup/user-modules.js";
import { fetchOptions } from "./check-rows.js";

/** Tokens that form whole characters; nearly always one token. */
export interface TokenText {
	/** Place of the first one in the row. */
	at: number;
	ids: number[];
	text: string;
	/** Weight of each as a target; 0: it is not trained. */
	weights: number[];
}

/** A trained reply: tokens `first` to `last`, inclusive. */
export interface TrainedSpan {
	message: number;
	first: number;
	last: number;
	weight: number;
}

export interface InspectedRow {
	location: string;
	shape: string;
	recordId: string | null;
	tokens: number;
	targetTokens: number;
	spans: TrainedSpan[];
	texts: TokenText[];
	/** For the user: how the rows are read. */
	notices: string[];
	/** Notes on this row, which a run trains nevertheless. */
	notes: NoticedRows[];
}

export interface InspectInput {
	native: Native;
	args: AgentTrainingConfig;
	code: RowsFromCode;
	/** From 0. */
	row: number;
	signal: AbortSignal | null;
	/** Called as a model or rows are fetched from the Hub. */
	fetching?: (progress: FetchProgress) => void;
}

/** Encodes a row. Throws `ARL_DATA` with its place if it cannot be used. */
export async function inspectRow(input: InspectInput): Promise<InspectedRow> {
	const { native, row, signal } = input;
	const scratch = new Scratch(native, input.args.cache_dir);
	try {
		// Nothing is trained, so nothing is written back.
		const local = await localArgs(input.args, fetchOptions(input));
		const args = { ...local.args, cache_dir: scratch.path(), mongo_write_back: "none" as const };
		const model = await readModelFolder(args.model_name_or_path, native);
		const encoder = native.TextEncoder.open(textOptions(args, model.maxPositionEmbeddings));
		const code = await loadCode(args, input.code);
		const { source, notices: read } = await openRows({ native, args, code, signal, datasetId: null });
		try {
			if (row >= source.length) {
				throw new ArlError("ARL_USAGE", `row ${row + 1} was asked for, and ${source.name} has ${source.length}`);
			}
			const { shape } = await detectShape(source, encoder, Uint32Array.of(source.lazy?.inOrder ? 0 : row), signal);
			const bytes = await rowAt(source, row);
			const notices = [...local.notices, ...read];
			return { location: source.location(row), shape, notices, ...encoded(source, row, encoder, bytes) };
		} finally {
			await source.close();
		}
	} finally {
		scratch.close();
	}
}

async function rowAt(source: AnySource, row: number): Promise<Uint8Array> {
	for (let next = source.lazy?.inOrder ? 0 : row; next <= row; next++) {
		const [found] = await takeRows(source, Uint32Array.of(next), 1);
		if (found === undefined) throw new ArlError("ARL_USAGE", `row ${row + 1} was asked for, and there are ${next}`);
		if (next < row) continue;
		if (found instanceof Uint8Array) return found;
		throw new ArlError("ARL_DATA", `${source.location(row)}: ${found.reason}: ${found.message}`);
	}
	throw new ArlError("ARL_INTERNAL", "no row was read");
}

function encoded(source: AnySource, row: number, encoder: NativeTextEncoder, bytes: Uint8Array) {
	try {
		const { inputIds, weights, spans, recordId, notes } = encoder.encode(bytes);
		return {
			notes: noticedRows({ notes: () => notes }, { location: () => source.location(row) }),
			recordId: recordId ?? null,
			tokens: inputIds.length,
			targetTokens: weights.reduce((sum, weight) => sum + (weight > 0 ? 1 : 0), 0),
			spans: spans.map(({ message, first, last }) => ({ message, first, last, weight: weights[first] ?? 0 })),
			texts: tokenTexts(encoder, inputIds, weights),
		};
	} catch (error) {
		const { code, message, hint } = toArlError(error);
		throw new ArlError(code, `${source.location(row)}: ${explainRow(bytes, message) ?? message}`, hint);
	}
}

/** The most tokens that share a character. */
const MOST_PARTS = 8;

/** The text of each token; tokens that share a character are joined. */
function tokenTexts(encoder: NativeTextEncoder, ids: Int32Array, weights: Float32Array): TokenText[] {
	const texts: TokenText[] = [];
	for (let at = 0; at < ids.length; ) {
		let count = 1;
		let text = encoder.decode(ids.subarray(at, at + 1), false);
		while (text.includes("\uFFFD") && count < MOST_PARTS && at + count < ids.length) {
			const longer = encoder.decode(ids.subarray(at, at + count + 1), false);
			count += 1;
			text = longer;
		}
		texts.push({
			at,
			ids: Array.from(ids.subarray(at, at + count)),
			text,
			weights: Array.from(weights.subarray(at, at + count)),
		});
		at += count;
	}
	return texts;
}
