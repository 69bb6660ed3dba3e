/** Micro-batches as bytes, for the ranks that compute them. */
import type { MicroBatch } from "../native.js";

/** Elements of each array of a micro-batch, in the order of their bytes; weights may be absent. */
export type Lengths = [inputIds: number, targets: number, positions: number, cuSeqlens: number, weights: number | null];

const bytesOf = (array: Int32Array | Float32Array) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

/** The lengths of all arrays, and their bytes. */
export function packBatches(batches: readonly MicroBatch[]): { lengths: Lengths[]; parts: Uint8Array[] } {
	const lengths = batches.map(({ inputIds, targets, positions, cuSeqlens, weights }): Lengths => {
		return [inputIds.length, targets.length, positions.length, cuSeqlens.length, weights?.length ?? null];
	});
	const parts = batches.flatMap(({ inputIds, targets, positions, cuSeqlens, weights }) =>
		[inputIds, targets, positions, cuSeqlens, ...(weights ? [weights] : [])].map(bytesOf),
	);
	return { lengths, parts };
}

/** What `packBatches` packed. */
export function unpackBatches(lengths: readonly Lengths[], bytes: Uint8Array): MicroBatch[] {
	let at = 0;
	// Copied: the bytes need not begin where numbers of four bytes may, and `slice` of Node's buffers copies nothing.
	const take = (length: number) => {
		at += 4 * length;
		return new Uint8Array(bytes.subarray(at - 4 * length, at)).buffer;
	};
	return lengths.map(([inputIds, targets, positions, cuSeqlens, weights]) => ({
		inputIds: new Int32Array(take(inputIds)),
		targets: new Int32Array(take(targets)),
		positions: new Int32Array(take(positions)),
		cuSeqlens: new Int32Array(take(cuSeqlens)),
		...(weights !== null && { weights: new Float32Array(take(weights)) }),
	}));
}

/** The micro-batches of `rank`: the `m`-th of a step is that of rank `m % world`. */
export function dealt(batches: readonly MicroBatch[], rank: number, world: number): MicroBatch[] {
	return batches.filter((_, m) => m % world === rank);
}
