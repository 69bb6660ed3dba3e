/** What a run needs to train images: the model's image processor, and how images are loaded. */
import { availableParallelism } from "node:os";
import { join } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { Gate } from "../../data/gate.js";
import type { PictureLoader, WantedImage } from "../../data/tokens/pictures.js";
import { ArlError } from "../../errors.js";
import { ImageLoader } from "../../images/loader.js";
import type {
	ImageProcessorInfo,
	ImageRef,
	MeasuredImage,
	Native,
	NativeImageProcessor,
	NativeTextEncoder,
	PreparedImage,
} from "../../native.js";
import type { ModelFacts } from "./model.js";

/** What happens to images of rows, once it is known. */
export type ImageMode = Exclude<AgentTrainingConfig["images"], "auto">;

/** The options that say how images are loaded and resized. */
export type VisionOptions = Pick<
	AgentTrainingConfig,
	| "images"
	| "min_pixels"
	| "max_pixels"
	| "image_root"
	| "image_allow_private"
	| "image_max_bytes"
	| "image_timeout"
	| "image_cache_dir"
>;

/** Images that are in work at a time while they are measured, those that wait for a server included. */
const MEASURED_AT_ONCE = 64;

/** Loads, measures and prepares images for one model. */
export class Vision {
	private opened: { processor: NativeImageProcessor; info: ImageProcessorInfo } | null = null;
	private readonly measuring = new Gate(MEASURED_AT_ONCE);
	/** Each decoding takes a core, and memory for a whole image; others are read meanwhile. */
	private readonly preparing = new Gate(2 * availableParallelism());

	/**
	 * `open`: opens the processor, when it is needed for the first time: text is trained without its file. `decodes`: measuring an
	 * image decodes it too, so that every fault is found.
	 */
	constructor(
		private readonly open: () => NativeImageProcessor,
		private readonly images: ImageLoader,
		private readonly decodes = false,
	) {}

	private get core(): { processor: NativeImageProcessor; info: ImageProcessorInfo } {
		if (this.opened === null) {
			const processor = this.open();
			this.opened = { processor, info: processor.info() };
		}
		return this.opened;
	}

	/** What the processor does. Throws `ARL_CONFIG` where its file is missing or cannot be used. */
	get info(): ImageProcessorInfo {
		return this.core.info;
	}

	/** The loader of rows in the shape that `encoder` knows. */
	loaderOf(encoder: NativeTextEncoder): PictureLoader {
		return new RowPictureLoader(this, encoder);
	}

	/** Patches of a resized image. */
	patches(height: number, width: number): number {
		const { patchSize } = this.info;
		return (height / patchSize) * (width / patchSize);
	}

	measure(ref: ImageRef): Promise<MeasuredImage> {
		return this.measuring.run(async () => {
			const bytes = await this.bytesOf(ref);
			const { processor } = this.core;
			const measured = await processor.measure(bytes);
			if (this.decodes) await this.preparing.run(() => processor.prepare(bytes));
			return measured;
		});
	}

	/** Decodes and resizes an image that was measured before. */
	prepare(ref: ImageRef): Promise<PreparedImage> {
		return this.preparing.run(async () => {
			const bytes = await this.bytesOf(ref).catch((error: unknown) => {
				throw failedLater("cannot be read any more", "Put it back", error);
			});
			return this.core.processor.prepare(bytes).catch((error: unknown) => {
				throw failedLater("cannot be decoded", "Put it right, or take its row out", error);
			});
		});
	}

	private async bytesOf({ url, path, bytes }: ImageRef): Promise<Uint8Array> {
		if (bytes !== undefined) return this.images.loadBytes(bytes).bytes;
		if (path !== undefined) return (await this.images.loadFile(path)).bytes;
		if (url === undefined) throw new ArlError("ARL_DATA", "the image has neither a URL nor bytes");
		// A path where a URL is expected; a single letter before a colon is a drive of Windows.
		const isUrl = /^\s*[a-z][a-z0-9+.-]+:/i.test(url);
		return (await (isUrl ? this.images.load(url) : this.images.loadFile(url))).bytes;
	}

	/** Ends what is being loaded. */
	close(): Promise<void> {
		return this.images.close();
	}
}

/** The images of rows of one shape. */
class RowPictureLoader implements PictureLoader {
	constructor(
		private readonly vision: Vision,
		private readonly encoder: NativeTextEncoder,
	) {}

	count(row: Uint8Array): number {
		return this.encoder.imageRefs(row).length;
	}

	measure(row: Uint8Array): Promise<MeasuredImage[]> {
		return Promise.all(this.encoder.imageRefs(row).map((ref) => named(ref, () => this.vision.measure(ref))));
	}

	prepare(row: Uint8Array, wanted: readonly WantedImage[]): Promise<PreparedImage[]> {
		const refs = this.encoder.imageRefs(row);
		return Promise.all(
			wanted.map(({ place, hash, height, width }) =>
				named(refs[place], async () => {
					const ref = refs[place];
					if (ref === undefined) throw changed(`the row has ${refs.length} images now`);
					const image = await this.vision.prepare(ref);
					if (image.hash !== hash) throw changed("it has other bytes");
					if (image.height === height && image.width === width) return image;
					throw changed(`it is ${image.width} x ${image.height} for the model, and was ${width} x ${height}`);
				}),
			),
		);
	}

	patches(height: number, width: number): number {
		return this.vision.patches(height, width);
	}

	get patchesOfToken(): number {
		return this.vision.info.mergeSize ** 2;
	}
}

/** An error that names which of a row's images it is about. */
async function named<T>(ref: ImageRef | undefined, read: () => Promise<T>): Promise<T> {
	try {
		return await read();
	} catch (error) {
		if (!(error instanceof ArlError) || error.code !== "ARL_DATA") throw error;
		throw new ArlError(error.code, `${ref?.place ?? "images"}: ${error.message}`, error.hint, { cause: error });
	}
}

const MADE_AGAIN = "to train on images as they are now, remove `.cache` in output_dir (or cache_dir) and begin again.";

function changed(what: string): ArlError {
	return new ArlError(
		"ARL_DATA",
		`changed since its tokens were made: ${what}`,
		`Put the image back as it was, and resume from the last checkpoint; ${MADE_AGAIN}`,
	);
}

/** The error for an image that was measured, and fails when a step needs it. `how`: to put it right. */
function failedLater(what: string, how: string, error: unknown): unknown {
	if (!(error instanceof ArlError) || error.code !== "ARL_DATA") return error;
	const hints = [error.hint, `${how}, and resume from the last checkpoint. \`arl data check\` decodes every image.`];
	const hint = hints.filter((line) => line !== "").join("\n");
	return new ArlError(error.code, `${what}: ${error.message}`, hint, { cause: error });
}

/** How an image processor and a loader are opened. */
export interface VisionInput {
	native: Native;
	options: VisionOptions;
	model: Pick<ModelFacts, "path" | "vision">;
	/** Folder of the run's caches: below it fetched images are kept. Null: they are not. */
	cacheDir: string | null;
	signal: AbortSignal | null;
	decodes?: boolean;
}

/**
 * Opens the image processor of a model that sees. Null: no images are trained.
 *
 * @throws ArlError `ARL_CONFIG` where images are to be trained and the model has no tower.
 */
export function openVision({ native, options, model, cacheDir, signal, decodes }: VisionInput): Vision | null {
	if (options.images === "drop" || options.images === "error") return null;
	if (!model.vision) {
		if (options.images === "auto") return null;
		throw new ArlError(
			"ARL_CONFIG",
			`images train: ${model.path} reads text only: its config.json has no vision_config`,
			"Take a model with a vision tower (Qwen2.5-VL, Qwen3-VL, Qwen3.5), or train on the text with --images drop.",
		);
	}
	const open = () => native.ImageProcessor.open(model.path, options.min_pixels, options.max_pixels);
	const loader = new ImageLoader({
		image_root: options.image_root,
		image_allow_private: options.image_allow_private,
		image_max_bytes: options.image_max_bytes,
		image_timeout: options.image_timeout,
		image_cache_dir: options.image_cache_dir ?? (cacheDir === null ? null : join(cacheDir, "images")),
		...(signal && { signal }),
	});
	return new Vision(open, loader, decodes ?? false);
}

/** Checks options that need a tower, once the model and what happens to images are known. Returns notices for the user. */
export function checkFreeze(
	{ freeze }: Pick<AgentTrainingConfig, "freeze">,
	model: Pick<ModelFacts, "path" | "vision">,
	mode: ImageMode | "auto",
): string[] {
	if (freeze.length === 0) return [];
	const shown = `freeze ${freeze.join(" ")}`;
	if (!model.vision)
		throw new ArlError("ARL_CONFIG", `${shown}: ${model.path} has no vision tower`, "Leave freeze out.");
	if (mode === "auto" || mode === "train") return [];
	if (freeze.includes("language"))
		throw new ArlError(
			"ARL_CONFIG",
			`${shown}: no images are trained, so that nothing would be`,
			"None of the first rows has an image. If later ones have, add --images train; else leave freeze out.",
		);
	return [`${shown} has no effect: no images are trained, and the vision tower comes out as it went in`];
}
