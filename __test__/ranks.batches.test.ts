/** Micro-batches on their way to ranks, and who is named when one holds the others up. */
import { describe, expect, it } from "vitest";
import type { MicroBatch } from "../src/native.js";
import { dataPlace, dealt, type EngineMesh, packBatches, unpackBatches } from "../src/ranks/batches.js";
import { holdUp, type Sign } from "../src/ranks/watch.js";

const batch = (length: number, weights = false): MicroBatch => {
	const ids = Int32Array.from({ length }, (_, i) => i);
	const all = { inputIds: ids, targets: ids.map((id) => -id), positions: ids, cuSeqlens: Int32Array.of(0, length) };
	return weights ? { ...all, weights: Float32Array.from(ids, (id) => id / 3) } : all;
};

describe("micro-batches", () => {
	it("are the same after their way to another rank, wherever their bytes begin", () => {
		const batches = [
			batch(3),
			batch(1, true),
			batch(70, true),
			{
				...batch(2),
				positions: Int32Array.of(0, 1, 0, 1, 0, 1),
				images: [
					{ height: 1, width: 2, pixels: Uint8Array.of(1, 2, 3, 4, 5, 6) },
					{ height: 1, width: 1, pixels: Uint8Array.of(7, 8, 9) },
				],
			},
			batch(5, true),
		];
		const { lengths, parts } = packBatches(batches);
		const sent = Buffer.concat([Buffer.from("x"), ...parts]).subarray(1);
		expect(unpackBatches(JSON.parse(JSON.stringify(lengths)), sent)).toEqual(batches);
		expect(unpackBatches([], new Uint8Array())).toEqual([]);
	});

	it("are dealt by their number", () => {
		const batches = [1, 2, 3, 4, 5].map((length) => batch(length));
		const lengths = (rank: number, world: number) => dealt(batches, rank, world).map(({ inputIds }) => inputIds.length);
		expect([lengths(0, 2), lengths(1, 2), lengths(6, 8)]).toEqual([[1, 3, 5], [2, 4], []]);
	});

	it("are the same for ranks of one data place: those that divide tokens or heads, and those of other stages", () => {
		const places = (world: number, mesh: EngineMesh) => {
			const all = Array.from({ length: world }, (_, rank) => dataPlace(rank, world, mesh));
			expect(new Set(all.map(({ size }) => size)).size).toBe(1);
			return [all[0]?.size, all.map(({ place }) => place).join("")];
		};
		expect(places(4, {})).toEqual([4, "0123"]);
		expect(places(4, { epSize: 2 })).toEqual([4, "0123"]);
		expect(places(4, { tpSize: 2 })).toEqual([2, "0011"]);
		expect(places(4, { ppSize: 2 })).toEqual([2, "0101"]);
		expect(places(12, { tpSize: 2, ppSize: 3 })).toEqual([2, "001100110011"]);
		expect(places(8, { cpSize: 2, tpSize: 2, ppSize: 2 })).toEqual([1, "00000000"]);
	});
});

describe("who holds the others up", () => {
	const sign = (name: string, waiting: number, silent = 0, phase = "at work"): Sign => ({
		name,
		waiting,
		silent,
		phase,
	});

	it("is nobody before the time is over", () => {
		expect(holdUp([sign("rank 0", 9), sign("rank 1", 0, 9)], 10)).toBeNull();
		expect(holdUp([sign("rank 0", 0), sign("rank 1", 0)], 10)).toBeNull();
	});

	it("is a rank that sends no sign of life, next to how long the others have waited", () => {
		const found = holdUp(
			[sign("rank 0", 12), sign("rank 1", 0, 12, "computing 2 micro-batches"), sign("rank 2", 11)],
			10,
		);
		expect(found).toBe(
			"rank 1 has sent no sign of life for 12 s; its last phase: computing 2 micro-batches; the others have waited for it for 12 s (ddp_timeout 10)",
		);
	});

	it("is a rank that lives and gives no gradients", () => {
		const found = holdUp([sign("rank 0", 11), sign("rank 1", 0, 1, "reading the model")], 10);
		expect(found).toBe("rank 1 is reading the model; the others have waited for it for 11 s (ddp_timeout 10)");
	});

	it("may be nobody in particular", () => {
		expect(holdUp([sign("rank 0", 11), sign("rank 1", 11)], 10)).toMatch(/^all ranks wait for each other since 10 s/);
	});
});

/** Two ranks that are connected; what their engines are asked is in `calls`. */
