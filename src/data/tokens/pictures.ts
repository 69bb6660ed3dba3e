/**
 * Images of rows on their way to the engine: measured when a row's tokens are made, and read again, decoded and resized when a
 * step needs them. Pixels are never stored. Knows neither where the bytes of an image come from nor how they are decoded.
 */
import { ArlError } from "../../errors.js";
import type {
	BatchImage,
	ImagePixels,
	MeasuredImage,
	MicroBatch,
	NativeTokenCache,
	PreparedImage,
	RowImage,
	TokenBatch,
} from "../../native.js";
import { Gate } from "../gate.js";
import type { KeptRows } from "../sources/kept-rows.js";
import type { AnySource } from "../sources/source.js";

/** Reads the images of rows, by an encoder that knows the rows' shape. */
export interface PictureLoader {
	/** How many images a row has. */
	count(row: Uint8Array): number;
	/**
	 * Measures a row's images, in the order of their places.
	 *
	 * @throws ArlError `ARL_DATA` with the number of the image and the reason if one cannot be used.
	 */
	measure(row: Uint8Array): Promise<MeasuredImage[]>;
	/**
	 * Decodes and resizes some of a row's images; `places`: which ones.
	 *
	 * @throws ArlError `ARL_DATA` if one cannot be read, or is not the one that was measured.
	 */
	prepare(row: Uint8Array, wanted: readonly WantedImage[]): Promise<PreparedImage[]>;
	/** Patches of an image of this size, in pixels as the model gets it. */
	patches(height: number, width: number): number;
	/** Patches that make a token. */
	readonly patchesOfToken: number;
}

/** An image of a row, as it was when the row's tokens were made. */
export type WantedImage = Omit<BatchImage, "index">;

/** What the token cache keeps of an image. */
export function rowImage({ hash, resizedHeight: height, resizedWidth: width }: MeasuredImage): RowImage {
	return { hash, height, width };
}

/** A micro-batch without its images. */
export function textBatch({ images: _, ...batch }: TokenBatch): MicroBatch {
	return batch;
}

/** Rows of a filled cache that are looked through for the sizes of their images; of others the largest are taken. */
const MOST_LOOKED_THROUGH = 200_000;
const LOOKED_THROUGH_TOGETHER = 64;
/** Rows that are read again at a time: one may have its images in it. */
const ROWS_AT_ONCE = 8;

/** Images and patches of some rows. */
export interface PictureCounts {
	images: number;
	patches: number;
}

/** The images of one source's rows. */
export class Pictures {
	/** Images and patches of each row whose images were measured, or looked up. */
	private readonly counts = new Map<number, PictureCounts>();
	/** The most images and patches that any row has, as far as they are known. */
	readonly largest: PictureCounts = { images: 0, patches: 0 };
	/** Rows whose images are known, or that have none. */
	private readonly known: Uint8Array;
	private readonly running = new Set<Promise<unknown>>();
	private readonly gate = new Gate(ROWS_AT_ONCE);

	/**
	 * `kept`: holds rows of a source that gives each only once; null: rows can be read again. `once`: each row is trained once, and
	 * not needed after that.
	 */
	constructor(
		private readonly source: AnySource,
		readonly loader: PictureLoader,
		private readonly kept: KeptRows | null,
		private readonly once: boolean,
	) {
		this.known = new Uint8Array(source.length);
	}

	/** Measures the images of a row that is about to be encoded. Throws as the loader does. */
	async measure(row: number, content: Uint8Array): Promise<MeasuredImage[]> {
		const images = await this.loader.measure(content);
		this.known[row] = 1;
		if (images.length === 0) return images;
		this.count(row, images.map(rowImage));
		await this.kept?.keep(row, content);
		return images;
	}

	/** Takes note of a row whose tokens are in the cache already. */
	async found(row: number, content: Uint8Array): Promise<void> {
		if (this.kept !== null && this.loader.count(content) > 0) await this.kept.keep(row, content);
	}

	private count(row: number, images: readonly { height: number; width: number }[]): void {
		const patches = images.reduce((sum, { height, width }) => sum + this.loader.patches(height, width), 0);
		this.counts.set(row, { images: images.length, patches });
		this.largest.images = Math.max(this.largest.images, images.length);
		this.largest.patches = Math.max(this.largest.patches, patches);
	}

	/** Looks up the images of rows that an earlier run has left in the cache. */
	lookThrough(cache: Pick<NativeTokenCache, "microBatch">, rows: Uint32Array): void {
		const unknown = rows.filter((row) => !this.known[row]);
		const most = Math.min(unknown.length, MOST_LOOKED_THROUGH);
		const some = Uint32Array.from(
			{ length: most },
			(_, i) => unknown[Math.floor((i * unknown.length) / most)] as number,
		);
		for (let first = 0; first < some.length; first += LOOKED_THROUGH_TOGETHER) {
			const together = some.subarray(first, first + LOOKED_THROUGH_TOGETHER);
			const byRow = new Map<number, BatchImage[]>();
			for (const image of cache.microBatch(together).images) {
				byRow.set(image.index, [...(byRow.get(image.index) ?? []), image]);
			}
			for (const [row, images] of byRow) this.count(row, images);
			for (const row of together) this.known[row] = 1;
		}
	}

	/** Images and patches of a micro-batch of these rows: exact, or a bound where not all rows were looked up. */
	sizeOf(rows: ArrayLike<number>): PictureCounts {
		const sum = { images: 0, patches: 0 };
		for (let i = 0; i < rows.length; i++) {
			const row = rows[i] as number;
			const none = this.known[row] ? { images: 0, patches: 0 } : this.largest;
			const { images, patches } = this.counts.get(row) ?? none;
			sum.images += images;
			sum.patches += patches;
		}
		return sum;
	}

	/** The micro-batches with the pixels of their images, read again from their rows. */
	fill(batches: readonly TokenBatch[]): Promise<MicroBatch[]> {
		const filled = this.read(batches);
		this.running.add(filled);
		const done = () => this.running.delete(filled);
		filled.then(done, done);
		return filled;
	}

	private async read(batches: readonly TokenBatch[]): Promise<MicroBatch[]> {
		const filled = await Promise.all(batches.map((batch) => this.readBatch(batch)));
		const rows = this.once ? new Set(batches.flatMap(({ images }) => images.map(({ index }) => index))) : [];
		for (const row of rows) await this.kept?.forget(row);
		return filled;
	}

	private async readBatch(batch: TokenBatch): Promise<MicroBatch> {
		const { images } = batch;
		if (images.length === 0) return textBatch(batch);
		// A row may come twice in a micro-batch: its images are read once, and given twice.
		const wanted = new Map<number, Map<number, WantedImage>>();
		for (const { index, ...image } of images) {
			const ofRow = wanted.get(index) ?? new Map<number, WantedImage>();
			wanted.set(index, ofRow.set(image.place, image));
		}
		const prepared = new Map<string, ImagePixels>();
		await Promise.all(
			[...wanted].map(async ([row, places]) => {
				const ofRow = [...places.values()];
				const pixels = await this.gate.run(() => this.prepareRow(row, ofRow));
				for (const [i, { place }] of ofRow.entries()) prepared.set(`${row} ${place}`, pixels[i] as ImagePixels);
			}),
		);
		return {
			...textBatch(batch),
			images: images.map(({ index, place }) => prepared.get(`${index} ${place}`) as ImagePixels),
		};
	}

	private async prepareRow(row: number, wanted: readonly WantedImage[]): Promise<PreparedImage[]> {
		const location = this.source.location(row);
		try {
			return await this.loader.prepare(await this.content(row), wanted);
		} catch (error) {
			if (!(error instanceof ArlError) || error.code !== "ARL_DATA") throw error;
			throw new ArlError(error.code, `${location}: ${error.message}`, error.hint, { cause: error });
		}
	}

	/** The text of a row, read again. */
	private async content(row: number): Promise<Uint8Array> {
		const [content] = this.kept === null ? await this.source.read([row]) : [await this.kept.read(row)];
		if (content instanceof Uint8Array) return content;
		const why = content ? `${content.reason}: ${content.message}` : "it is not there";
		throw new ArlError(
			"ARL_DATA",
			`the row cannot be read again for its images: ${why}`,
			"Its tokens were made when it could be. Put it back, and resume the run.",
		);
	}

	/** Resolves when nothing is read any more. */
	async close(): Promise<void> {
		await Promise.allSettled(this.running);
		await this.kept?.close();
	}
}
