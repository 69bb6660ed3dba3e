import { describe, expect, it } from "vitest";
import { createOrder, proportionalCounts, shuffle, xoshiro128 } from "../src/data/sampler/order.js";
import { errorOf } from "./support/folder.js";
import { fc, holds } from "./support/properties.js";

const ascending = (rows: Uint32Array) => [...rows].sort((a, b) => a - b);

describe("the order of rows", () => {
	it("draws the numbers of xoshiro128**'s reference code", () => {
		const next = xoshiro128([1, 2, 3, 4]);
		// From the reference code in C with the state 1, 2, 3, 4.
		expect(Array.from({ length: 8 }, next)).toEqual([
			11520, 0, 5927040, 70819200, 2031721883, 1637235492, 1287239034, 3734860849,
		]);
	});

	it("is a permutation that depends on seed and epoch alone", () => {
		const order = (seed: number) => createOrder({ rows: 1000, seed, strategy: "random" });
		const first = order(7).epoch(0);
		expect(ascending(first)).toEqual(Array.from({ length: 1000 }, (_, i) => i));
		expect(order(7).epoch(0)).toEqual(first);
		expect(order(7).epoch(1)).not.toEqual(first);
		expect(order(8).epoch(0)).not.toEqual(first);
	});

	it("of any rows is each usable one once, as many of each part as its cap allows", () => {
		const part = fc.record({ rows: fc.integer({ min: 1, max: 30 }), cap: fc.option(fc.integer({ min: 1, max: 40 })) });
		const parts = fc.array(part, { minLength: 1, maxLength: 4 });
		const claim = (given: { rows: number; cap: number | null }[], seed: number, step: number, random: boolean) => {
			const caps = { rows: given.map(({ rows }) => rows), caps: given.map(({ cap }) => cap) };
			const rows = caps.rows.reduce((sum, count) => sum + count, 0);
			const usable = (row: number) => row % step === 0;
			const made = () => createOrder({ rows, seed, strategy: random ? "random" : "sequential", usable, caps });
			const order = made();
			expect(ascending(order.epoch(2))).toEqual([...order.all]);
			expect([...order.all]).toEqual([...new Set(order.all)].filter(usable));
			expect(order.rowsPerEpoch).toBe(order.all.length);
			expect(made().epoch(2)).toEqual(order.epoch(2));
			if (!random) expect([...order.epoch(2)]).toEqual([...order.all]);
			let start = 0;
			for (const { rows: count, cap } of given) {
				const within = (row: number) => row >= start && row < start + count;
				const all = Array.from({ length: count }, (_, i) => start + i).filter(usable).length;
				expect([...order.all].filter(within)).toHaveLength(Math.min(all, cap ?? all));
				start += count;
			}
		};
		holds(150, fc.property(parts, fc.nat(0xffffffff), fc.integer({ min: 1, max: 3 }), fc.boolean(), claim));
	});

	it("stays the same from release to release", () => {
		// A resumed run must find the order that an earlier version of the program had.
		expect([...createOrder({ rows: 10, seed: 42, strategy: "random" }).epoch(0)]).toMatchInlineSnapshot(`
			[
			  2,
			  8,
			  0,
			  5,
			  9,
			  4,
			  1,
			  3,
			  7,
			  6,
			]
		`);
	});

	it("shuffles without favour", () => {
		const counts = new Map<string, number>();
		for (let i = 0; i < 6000; i++) {
			const key = shuffle(Uint32Array.of(0, 1, 2), `draw ${i}`).join("");
			counts.set(key, (counts.get(key) ?? 0) + 1);
		}
		expect(counts.size).toBe(6);
		// 1000 expected each, standard deviation 29.
		for (const count of counts.values()) expect(Math.abs(count - 1000)).toBeLessThan(150);
	});

	it("is the same in slices, between which everything else comes to its turn", async () => {
		const options = [
			{ rows: 1_000_000, seed: 5, strategy: "random" as const },
			{ rows: 700_000, seed: 5, strategy: "random" as const, mixture: { rows: [500_000, 200_000], weights: [1, 3] } },
		];
		for (const given of options) {
			const [sliced, whole] = [createOrder(given), createOrder(given)];
			let turns = 0;
			let ready = false;
			const count = () => {
				turns += 1;
				if (!ready) setImmediate(count);
			};
			setImmediate(count);
			await sliced.prepare(3);
			ready = true;
			expect(turns).toBeGreaterThanOrEqual(5);
			expect(Buffer.from(sliced.epoch(3).buffer).equals(Buffer.from(whole.epoch(3).buffer))).toBe(true);
		}
	});

	it("is made once for each of the epochs around a checkpoint, however often they are asked for", () => {
		const order = createOrder({ rows: 100, seed: 1, strategy: "random" });
		const epochs = [0, 1, 2].map((epoch) => order.epoch(epoch));
		for (const epoch of [1, 0, 2, 0, 1]) expect(order.epoch(epoch)).toBe(epochs[epoch]);
		// The one that was used longest ago goes.
		order.epoch(3);
		expect(order.epoch(0)).toBe(epochs[0]);
		expect(order.epoch(2)).not.toBe(epochs[2]);
		expect(order.epoch(2)).toEqual(epochs[2]);
	});

	it("keeps the files' order when sequential", () => {
		const order = createOrder({ rows: 4, seed: 1, strategy: "sequential", usable: (row) => row !== 2 });
		expect([...order.epoch(0)]).toEqual([0, 1, 3]);
		expect([...order.epoch(5)]).toEqual([0, 1, 3]);
	});

	it("rounds the shares of a mixture so that they add up", () => {
		expect(proportionalCounts(10, [1, 1, 1])).toEqual([4, 3, 3]);
		expect(proportionalCounts(100, [0.7, 0.2, 0.1])).toEqual([70, 20, 10]);
	});

	it("mixes by weight: no row of a part comes again before all others of it have come", () => {
		const order = createOrder({
			rows: 30,
			seed: 3,
			strategy: "random",
			mixture: { rows: [20, 10], weights: [1, 2] },
		});
		expect(order.rowsPerEpoch).toBe(30);
		const epochs = [0, 1, 2, 3].map((epoch) => order.epoch(epoch));
		for (const rows of epochs) {
			expect(rows.filter((row) => row < 20).length).toBe(10);
			const second = rows.filter((row) => row >= 20);
			const times = new Map<number, number>();
			for (const row of second) times.set(row, (times.get(row) ?? 0) + 1);
			expect([...times.values()]).toEqual(Array.from({ length: 10 }, () => 2));
		}
		// Two epochs take ten rows each of the first part: together each of its twenty rows once.
		const both = [...(epochs[0] ?? []), ...(epochs[1] ?? [])].filter((row) => row < 20);
		expect(ascending(Uint32Array.from(both))).toEqual(Array.from({ length: 20 }, (_, i) => i));
	});

	it("mixes any parts with any weights so that no row of a part is ahead of another by more than one", () => {
		const part = fc.tuple(fc.integer({ min: 1, max: 12 }), fc.double({ min: 0.05, max: 5, noNaN: true }));
		const claim = (parts: [number, number][], seed: number) => {
			const mixture = { rows: parts.map(([rows]) => rows), weights: parts.map(([, weight]) => weight) };
			const rows = mixture.rows.reduce((sum, count) => sum + count, 0);
			const order = createOrder({ rows, seed, strategy: "random", mixture });
			const times = new Array<number>(rows).fill(0);
			for (let epoch = 0; epoch < 4; epoch++) {
				const trained = order.epoch(epoch);
				expect(trained).toHaveLength(order.rowsPerEpoch);
				for (const row of trained) times[row] = (times[row] ?? 0) + 1;
				let start = 0;
				for (const count of mixture.rows) {
					const those = times.slice(start, start + count);
					expect(Math.max(...those) - Math.min(...those)).toBeLessThanOrEqual(1);
					start += count;
				}
			}
		};
		holds(150, fc.property(fc.array(part, { minLength: 1, maxLength: 3 }), fc.nat(0xffffffff), claim));
	});

	it("mixes usable rows only, and refuses a part that has none", async () => {
		const options = { rows: 6, seed: 1, strategy: "random" as const, usable: (row: number) => row >= 3 };
		const error = await errorOf(() => createOrder({ ...options, mixture: { rows: [3, 3], weights: [1, 1] } }));
		expect(error.code).toBe("ARL_DATA");
		const order = createOrder({ ...options, mixture: { rows: [4, 2], weights: [1, 1] } });
		expect(order.rowsPerEpoch).toBe(3);
		expect([...order.epoch(0)].every((row) => row >= 3)).toBe(true);
	});

	it("refuses weights that do not match the entries", async () => {
		const error = await errorOf(() =>
			createOrder({ rows: 6, seed: 1, strategy: "random", mixture: { rows: [3, 3], weights: [1] } }),
		);
		expect(error.message).toContain("train_weights");
	});
});
