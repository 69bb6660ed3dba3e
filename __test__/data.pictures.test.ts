import { describe, expect, it } from "vitest";
import type { AnySource } from "../src/data/sources/source.js";
import { type PictureLoader, Pictures } from "../src/data/tokens/pictures.js";
import type { MeasuredImage, TokenBatch } from "../src/native.js";
import { errorOf } from "./support/folder.js";

const measured = (height: number, width: number): MeasuredImage => ({
	format: "png",
	height,
	width,
	resizedHeight: height,
	resizedWidth: width,
	tokens: (height * width) / 4,
	hash: `${height} ${width}`,
});

/** Rows that are lists of sizes of images; a patch is a pixel, and the pixels of an image are its height. */
function picturesOf(rows: readonly (readonly [number, number][])[], reads: number[][] = []) {
	const imagesOf = (row: Uint8Array) => JSON.parse(Buffer.from(row).toString()) as [number, number][];
	const loader: PictureLoader = {
		patchesOfToken: 4,
		patches: (height, width) => height * width,
		count: (row) => imagesOf(row).length,
		measure: async (row) => imagesOf(row).map(([height, width]) => measured(height, width)),
		prepare: async (row, wanted) =>
			wanted.map(({ place }) => {
				const [height, width] = imagesOf(row)[place] ?? [0, 0];
				return { height, width, hash: "", pixels: new Uint8Array(3 * height * width).fill(height) };
			}),
	};
	const source = {
		length: rows.length,
		location: (row: number) => `rows:${row + 1}`,
		read: async (indexes: ArrayLike<number>) => {
			reads.push(Array.from(indexes));
			return Array.from(indexes, (row) => Buffer.from(JSON.stringify(rows[row])));
		},
	} as unknown as AnySource;
	return { source, pictures: new Pictures(source, loader, null, false) };
}

const batchOf = (images: [row: number, place: number][]): TokenBatch => ({
	inputIds: new Int32Array(),
	targets: new Int32Array(),
	positions: new Int32Array(),
	cuSeqlens: new Int32Array(),
	images: images.map(([index, place]) => ({ index, place, hash: "", height: 0, width: 0 })),
});

const rowOf = (sizes: readonly [number, number][]) => Buffer.from(JSON.stringify(sizes));

describe("the images of rows", () => {
	it("have the size of those that were measured, rows without any none, and rows that nobody has looked at the largest", async () => {
		const rows: [number, number][][] = [
			[
				[2, 2],
				[4, 2],
			],
			[],
			[[2, 6]],
			[[8, 8]],
		];
		const { pictures } = picturesOf(rows);
		for (const row of [0, 1, 2]) await pictures.measure(row, rowOf(rows[row] ?? []));
		expect(pictures.sizeOf([0, 1])).toEqual({ images: 2, patches: 12 });
		expect(pictures.sizeOf([1])).toEqual({ images: 0, patches: 0 });
		expect(pictures.sizeOf([3])).toEqual({ images: 2, patches: 12 });
	});

	it("of a filled cache are looked up once", async () => {
		const { pictures } = picturesOf([[], [[2, 2]], [[4, 4]]]);
		const asked: number[][] = [];
		const cache = {
			microBatch: (rows: Uint32Array): TokenBatch => {
				asked.push([...rows]);
				const images = [...rows]
					.filter((row) => row > 0)
					.map((index) => ({ index, place: 0, hash: "", height: 2 * index, width: 2 * index }));
				return { ...batchOf([]), images };
			},
		};
		pictures.lookThrough(cache, Uint32Array.of(0, 1, 2));
		pictures.lookThrough(cache, Uint32Array.of(0, 1, 2));
		expect(asked).toEqual([[0, 1, 2]]);
		expect(pictures.sizeOf([0, 2])).toEqual({ images: 1, patches: 16 });
	});

	it("come in the order of their tokens, each row read once however often it is in a micro-batch", async () => {
		const reads: number[][] = [];
		const { pictures } = picturesOf(
			[
				[
					[1, 1],
					[2, 1],
				],
				[[3, 1]],
			],
			reads,
		);
		const [first, second] = await pictures.fill([
			batchOf([
				[1, 0],
				[0, 1],
				[1, 0],
				[0, 0],
			]),
			batchOf([]),
		]);
		expect(first?.images?.map(({ height, pixels }) => [height, pixels[0]])).toEqual([
			[3, 3],
			[2, 2],
			[3, 3],
			[1, 1],
		]);
		expect(second).not.toHaveProperty("images");
		expect(reads.flat().sort()).toEqual([0, 1]);
	});

	it("of a row that is gone end with its place", async () => {
		const { source, pictures } = picturesOf([[[1, 1]]]);
		source.read = async () => [{ reason: "deleted", message: "the document does not exist any more" }];
		const error = await errorOf(pictures.fill([batchOf([[0, 0]])]));
		expect(error.message).toBe(
			"rows:1: the row cannot be read again for its images: deleted: the document does not exist any more",
		);
	});
});
