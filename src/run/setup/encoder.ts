/** The encoder of a source's rows: their shape, and whether their images are trained, follow from the first rows. */
import type { AgentTrainingConfig } from "../../config/schema.js";
import { KeptRows } from "../../data/sources/kept-rows.js";
import { Scratch } from "../../data/sources/scratch.js";
import type { AnySource } from "../../data/sources/source.js";
import { type PictureLoader, Pictures } from "../../data/tokens/pictures.js";
import type { Native, NativeTextEncoder, TextOptions } from "../../native.js";
import { detectShape } from "./rows.js";
import type { ImageMode, Vision } from "./vision.js";

export interface EncoderInput {
	native: Native;
	/** Options of the encoder; with `images auto` those without images. */
	textOptions: TextOptions;
	/** Null: no images are trained. */
	vision: Vision | null;
	images: AgentTrainingConfig["images"];
	source: AnySource;
	/** Rows that are needed, soonest first. */
	wanted: Uint32Array;
	signal: AbortSignal | null;
	/** An encoder that is open with these options already. */
	encoder?: NativeTextEncoder;
}

/** An encoder that knows the shape of its rows. */
export interface OpenedEncoder {
	encoder: NativeTextEncoder;
	textOptions: TextOptions;
	shape: string;
	firstRows: Uint8Array[];
	images: ImageMode;
	/** Null: no images are trained. */
	loader: PictureLoader | null;
	/** What to do about rows with images that are not trained; undefined: what a model that reads text takes. */
	imageHint: string | undefined;
}

const TRAIN_THEM =
	"The model could see them, and none of the first rows has an image: add --images train, or leave images out of the text with --images drop.";

/** Opens the encoder of some rows. Throws with the place of a row if their shape is not known. */
export async function openEncoder(input: EncoderInput): Promise<OpenedEncoder> {
	const { native, textOptions, vision, images, source, wanted, signal } = input;
	const encoder = input.encoder ?? native.TextEncoder.open(textOptions);
	const { shape, firstRows } = await detectShape(source, encoder, wanted, signal);
	const opened = { encoder, textOptions, shape, firstRows, imageHint: undefined };
	if (images === "train") return { ...opened, images, loader: vision?.loaderOf(encoder) ?? null };
	if (images !== "auto") return { ...opened, images, loader: null };
	const refusing = { ...opened, images: "error" as const, loader: null };
	if (vision === null) return refusing;
	if (!firstRows.some((row) => mayHaveImages(row, textOptions.columns))) return { ...refusing, imageHint: TRAIN_THEM };
	const options = trainText(textOptions, vision);
	const seeing = native.TextEncoder.open(options);
	seeing.detect(firstRows);
	if (!firstRows.some((row) => seeing.imageRefs(row).length > 0)) return { ...refusing, imageHint: TRAIN_THEM };
	return {
		...opened,
		encoder: seeing,
		textOptions: options,
		images: "train",
		loader: vision.loaderOf(seeing),
	};
}

/** Options of an encoder whose rows' images are trained. */
export function trainText(options: TextOptions, vision: Pick<Vision, "info">): TextOptions {
	return { ...options, images: "train", imageProcessor: vision.info.fingerprint };
}

/** Whether a row can have an image, by its text alone: most rows need no other encoder to tell. */
function mayHaveImages(row: Uint8Array, columns: Readonly<Record<string, string>> = {}): boolean {
	const names = ["image", columns.images ?? "image", columns.image ?? "image"];
	const text = Buffer.from(row.buffer, row.byteOffset, row.byteLength);
	return names.some((name) => text.includes(name));
}

/** The images of a source's rows. `folder`: for rows that the source gives only once. `once`: each row is trained once. */
export function picturesOf(
	native: Native,
	source: AnySource,
	loader: PictureLoader | null,
	folder: string,
	once: boolean,
): { pictures: Pictures | null; close: () => Promise<void> } {
	if (loader === null) return { pictures: null, close: async () => {} };
	const scratch = source.lazy?.inOrder ? new Scratch(native, folder) : null;
	const pictures = new Pictures(source, loader, scratch && new KeptRows(scratch), once);
	const close = async () => {
		await pictures.close();
		scratch?.close();
	};
	return { pictures, close };
}
