/** One row as the model will see it: its tokens, which of them are trained, and with what weight. Writes nothing. */
import type { AgentTrainingConfig } from "../config/schema.js";
import { explainRow } from "../data/sources/explain.js";
import { Scratch } from "../data/sources/scratch.js";
import { type AnySource, takeRows } from "../data/sources/source.js";
import { type NoticedRows, noticedRows } from "../data/tokens/notes.js";
import { type PictureLoader, rowImage } from "../data/tokens/pictures.js";
import { ArlError, toArlError } from "../errors.js";
import { type FetchProgress, localArgs } from "../hub/index.js";
import { imageName } from "../images/name.js";
import type {
	EncodedImage,
	ImageProcessorInfo,
	MeasuredImage,
	Native,
	NativeTextEncoder,
	RowImage,
} from "../native.js";
import { openRows, type RowsFromCode } from "../run/setup/dataset.js";
import { openEncoder } from "../run/setup/encoder.js";
import { readModelFolder } from "../run/setup/model.js";
import { textOptions } from "../run/setup/options.js";
import { loadCode } from "../run/setup/user-modules.js";
import { openVision, type Vision } from "../run/setup/vision.js";
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

/** An image of the row, as the model gets it. */
export interface InspectedImage {
	/** For people: a file's name, the end of a URL. */
	name: string;
	/** The place of its first token in the row, and how many it has. */
	at: number;
	tokens: number;
	/** Its tokens in columns and rows. */
	columns: number;
	rows: number;
	/** In pixels, as it is shown, and as the model gets it. */
	original: { width: number; height: number };
	resized: { width: number; height: number };
}

export interface InspectedRow {
	location: string;
	shape: string;
	recordId: string | null;
	tokens: number;
	targetTokens: number;
	spans: TrainedSpan[];
	texts: TokenText[];
	/** Images that the model sees; empty: none. */
	images: InspectedImage[];
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
	/** Called with the pixels of each image that the model sees; absent: they are not decoded. */
	pixels?: (image: InspectedImage, pixels: Uint8Array) => void;
}

/** Encodes a row. Throws `ARL_DATA` with its place if it cannot be used. */
export async function inspectRow(input: InspectInput): Promise<InspectedRow> {
	const { native, row, signal } = input;
	const scratch = new Scratch(native, input.args.cache_dir);
	let vision: Vision | null = null;
	try {
		// Nothing is trained, so nothing is written back.
		const local = await localArgs(input.args, fetchOptions(input));
		const args = { ...local.args, cache_dir: scratch.path(), mongo_write_back: "none" as const };
		const model = await readModelFolder(args.model_name_or_path, native);
		const cacheDir = input.args.cache_dir ?? args.cache_dir;
		vision = openVision({ native, options: args, model, cacheDir, signal });
		const code = await loadCode(args, input.code);
		const { source, notices: read } = await openRows({ native, args, code, signal, datasetId: null });
		try {
			if (row >= source.length) {
				throw new ArlError("ARL_USAGE", `row ${row + 1} was asked for, and ${source.name} has ${source.length}`);
			}
			const wanted = Uint32Array.of(source.lazy?.inOrder ? 0 : row);
			const options = textOptions(args, model.maxPositionEmbeddings, vision);
			const about = { native, textOptions: options, vision, images: args.images, source, wanted, signal };
			const { encoder, shape, loader } = await openEncoder(about);
			const bytes = await rowAt(source, row);
			const notices = [...local.notices, ...read];
			const location = source.location(row);
			const seen = vision === null || loader === null ? null : { vision, loader };
			return { location, shape, notices, ...(await encoded(location, encoder, bytes, seen, input.pixels)) };
		} finally {
			await source.close();
		}
	} finally {
		await vision?.close();
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

/** `seen`: how images are loaded; null: the model does not see them. */
async function encoded(
	location: string,
	encoder: NativeTextEncoder,
	bytes: Uint8Array,
	seen: { vision: Vision; loader: PictureLoader } | null,
	pixels: InspectInput["pixels"],
) {
	try {
		const measured = (await seen?.loader.measure(bytes)) ?? [];
		const sizes = seen === null ? undefined : measured.map(rowImage);
		const { inputIds, weights, spans, recordId, notes, images: places } = encoder.encode(bytes, sizes);
		const names = seen === null ? [] : encoder.imageRefs(bytes).map(imageName);
		const images = places.map((image) =>
			inspectedImage(image, measured[image.place], names[image.place], seen?.vision.info),
		);
		if (pixels && seen !== null) {
			for (const [i, image] of images.entries()) {
				const place = places[i]?.place ?? 0;
				const [prepared] = await seen.loader.prepare(bytes, [{ ...(sizes?.[place] as RowImage), place }]);
				if (prepared) pixels(image, prepared.pixels);
			}
		}
		return {
			images,
			notes: noticedRows({ notes: () => notes }, { location: () => location }),
			recordId: recordId ?? null,
			tokens: inputIds.length,
			targetTokens: weights.reduce((sum, weight) => sum + (weight > 0 ? 1 : 0), 0),
			spans: spans.map(({ message, first, last }) => ({ message, first, last, weight: weights[first] ?? 0 })),
			texts: tokenTexts(encoder, inputIds, weights, images),
		};
	} catch (error) {
		const { code, message, hint } = toArlError(error);
		throw new ArlError(code, `${location}: ${explainRow(bytes, message) ?? message}`, hint);
	}
}

function inspectedImage(
	{ first, count, height, width }: EncodedImage,
	measured: MeasuredImage | undefined,
	name = "image",
	{ patchSize, mergeSize }: Pick<ImageProcessorInfo, "patchSize" | "mergeSize"> = { patchSize: 1, mergeSize: 1 },
): InspectedImage {
	const side = patchSize * mergeSize;
	return {
		name,
		at: first,
		tokens: count,
		columns: width / side,
		rows: height / side,
		original: { width: measured?.width ?? width, height: measured?.height ?? height },
		resized: { width, height },
	};
}

/** An image in the text of a row. */
export function imageText({ columns, rows, tokens, name }: InspectedImage): string {
	return `[image ${columns} x ${rows} = ${tokens} ${tokens === 1 ? "token" : "tokens"}, ${name}]`;
}

/** The most tokens that share a character. */
const MOST_PARTS = 8;

/** The text of each token; tokens that share a character are joined, and those of an image. */
function tokenTexts(
	encoder: NativeTextEncoder,
	ids: Int32Array,
	weights: Float32Array,
	images: readonly InspectedImage[],
): TokenText[] {
	const texts: TokenText[] = [];
	const starts = new Map(images.map((image) => [image.at, image]));
	for (let at = 0; at < ids.length; ) {
		const image = starts.get(at);
		if (image !== undefined) {
			const end = at + image.tokens;
			const of = { ids: Array.from(ids.subarray(at, end)), weights: Array.from(weights.subarray(at, end)) };
			texts.push({ at, text: imageText(image), ...of });
			at = end;
			continue;
		}
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
