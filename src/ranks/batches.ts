/** Micro-batches as bytes, for the ranks that compute them. */
import type { EngineOptions, MicroBatch } from "../native.js";

/**
 * Elements of each array of a micro-batch, in the order of their bytes; weights may be absent. Behind them are the pixels of its
 * images: height and width of each.
 */
export type Lengths = [
	inputIds: number,
	targets: number,
	positions: number,
	cuSeqlens: number,
	weights: number | null,
	images: [height: number, width: number][],
];

const CHANNELS = 3;

const bytesOf = (array: Int32Array | Float32Array) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

/** The lengths of all arrays, and their bytes. */
export function packBatches(batches: readonly MicroBatch[]): { lengths: Lengths[]; parts: Uint8Array[] } {
	const lengths = batches.map(({ inputIds, targets, positions, cuSeqlens, weights, images = [] }): Lengths => {
		const sizes = images.map(({ height, width }): [number, number] => [height, width]);
		return [inputIds.length, targets.length, positions.length, cuSeqlens.length, weights?.length ?? null, sizes];
	});
	const parts = batches.flatMap(({ inputIds, targets, positions, cuSeqlens, weights, images = [] }) => [
		...[inputIds, targets, positions, cuSeqlens, ...(weights ? [weights] : [])].map(bytesOf),
		...images.map(({ pixels }) => pixels),
	]);
	return { lengths, parts };
}

/** What `packBatches` packed. */
export function unpackBatches(lengths: readonly Lengths[], bytes: Uint8Array): MicroBatch[] {
	let at = 0;
	// Copied: the bytes need not begin where numbers of four bytes may, and `slice` of Node's buffers copies nothing.
	const takeBytes = (length: number) => {
		at += length;
		return new Uint8Array(bytes.subarray(at - length, at));
	};
	const take = (length: number) => takeBytes(4 * length).buffer;
	return lengths.map(([inputIds, targets, positions, cuSeqlens, weights, images]) => ({
		inputIds: new Int32Array(take(inputIds)),
		targets: new Int32Array(take(targets)),
		positions: new Int32Array(take(positions)),
		cuSeqlens: new Int32Array(take(cuSeqlens)),
		...(weights !== null && { weights: new Float32Array(take(weights)) }),
		...(images.length > 0 && {
			images: images.map(([height, width]) => ({ height, width, pixels: takeBytes(CHANNELS * height * width) })),
		}),
	}));
}

/** The micro-batches of data place `place` of `size`: the `m`-th of a step is that of place `m % size`. */
export function dealt(batches: readonly MicroBatch[], place: number, size: number): MicroBatch[] {
	return batches.filter((_, m) => m % size === place);
}

/** What an engine's options say of its mesh; absent: 1. */
export type EngineMesh = Pick<EngineOptions, "dpReplicateSize" | "tpSize" | "cpSize" | "epSize" | "ppSize">;

/**
 * The data place of a rank, and how many there are: rank `((p D + d) C + c) T + t` has place `d` of `D`. Ranks of one place compute
 * the same micro-batches together.
 */
export function dataPlace(rank: number, world: number, mesh: EngineMesh): { place: number; size: number } {
	const { tpSize = 1, cpSize = 1, ppSize = 1 } = mesh;
	const [slices, stage] = [tpSize * cpSize, world / ppSize];
	return { place: Math.floor((rank % stage) / slices), size: stage / slices };
}
