import { describe, expect, it } from "vitest";
import { epochAfter, epochBatches, StepPlan } from "../src/data/sampler/batches.js";
import { createOrder } from "../src/data/sampler/order.js";

function plan(rows: number, batchSize: number, accumulation: number, length: { epochs?: number; maxSteps?: number }) {
	const order = createOrder({ rows, seed: 1, strategy: "sequential" });
	return new StepPlan(
		(epoch) => epochBatches(order, epoch, { batchSize }),
		{
			maxSteps: length.maxSteps ?? -1,
			numTrainEpochs: length.epochs ?? 1,
			gradientAccumulationSteps: accumulation,
		},
		true,
	);
}

const rowsOf = (steps: StepPlan, step: number) => steps.rows(step).map((rows) => [...rows]);

describe("micro-batches, steps and epochs", () => {
	it("ends an epoch with a smaller step", () => {
		const steps = plan(11, 2, 4, { epochs: 2 });
		expect(steps.stepsOf(0)).toBe(2);
		expect(steps.totalSteps).toBe(4);
		expect(rowsOf(steps, 0)).toEqual([
			[0, 1],
			[2, 3],
			[4, 5],
			[6, 7],
		]);
		expect(rowsOf(steps, 1)).toEqual([[8, 9], [10]]);
		expect(rowsOf(steps, 2)).toEqual(rowsOf(steps, 0));
		expect(steps.place(1)).toEqual({ epoch: 0, first: 4, end: 6, batchesInEpoch: 6, lastOfEpoch: true });
	});

	it("counts fractions of epochs as Hugging Face does: a share of the steps, rounded up", () => {
		expect(plan(100, 10, 1, { epochs: 2.25 }).totalSteps).toBe(23);
		expect(plan(100, 10, 3, { epochs: 0.5 }).totalSteps).toBe(2);
	});

	it("lets max_steps override the epochs, and goes through as many epochs as it takes", () => {
		const steps = plan(4, 2, 1, { maxSteps: 5, epochs: 1 });
		expect(steps.totalSteps).toBe(5);
		expect(steps.place(4)).toMatchObject({ epoch: 2, first: 0 });
	});

	it("logs epochs as micro-batches done of the epoch", () => {
		const steps = plan(11, 2, 4, { epochs: 2 });
		expect([0, 1, 2].map((step) => epochAfter(steps.place(step)))).toEqual([4 / 6, 1, 1 + 4 / 6]);
	});

	it("plans packed epochs of different sizes", () => {
		const order = createOrder({ rows: 9, seed: 1, strategy: "sequential" });
		// Stands in for best fit: epoch by epoch other groups, here by how often it was called.
		let calls = 0;
		const sizes = [3, 2];
		const seen = new Map<number, number>();
		const steps = new StepPlan(
			(epoch) => {
				if (!seen.has(epoch)) seen.set(epoch, sizes[calls++ % 2] as number);
				const size = seen.get(epoch) as number;
				return epochBatches(order, epoch, {
					batchSize: 1,
					packed: {
						maxTokens: 10,
						pack: (rows) => {
							const groups: Uint32Array[] = [];
							for (let at = 0; at < rows.length; at += size) {
								groups.push(Uint32Array.from({ length: Math.min(size, rows.length - at) }, (_, i) => at + i));
							}
							return groups;
						},
					},
				});
			},
			{ maxSteps: -1, numTrainEpochs: 2.5, gradientAccumulationSteps: 2 },
			false,
		);
		// Epochs of 3, 5 and 3 micro-batches: 2 + 3 + half of 2 steps.
		expect(steps.totalSteps).toBe(6);
		expect(steps.place(2)).toMatchObject({ epoch: 1, first: 0, end: 2 });
		expect(rowsOf(steps, 4)).toEqual([[8]]);
		expect(steps.place(5)).toMatchObject({ epoch: 2, first: 0 });
	});

	it("shuffles no epoch to count its steps, and none again that it goes back to", async () => {
		const asked: number[] = [];
		const order = createOrder({ rows: 10, seed: 1, strategy: "random" });
		const watched = {
			...order,
			epoch: (epoch: number) => {
				asked.push(epoch);
				return order.epoch(epoch);
			},
			prepare: async (epoch: number) => {
				asked.push(epoch);
				await order.prepare(epoch);
			},
		};
		const steps = new StepPlan(
			(epoch) => epochBatches(watched, epoch, { batchSize: 2 }),
			{ maxSteps: -1, numTrainEpochs: 4, gradientAccumulationSteps: 5 },
			true,
		);
		expect(steps.totalSteps).toBe(4);
		expect(steps.place(3)).toEqual({ epoch: 3, first: 0, end: 5, batchesInEpoch: 5, lastOfEpoch: true });
		expect(asked).toEqual([]);
		await steps.prepare(0);
		expect(asked).toEqual([0, 1]);
		await steps.prepare(1);
		expect(asked).toEqual([0, 1, 1, 2]);
		const before = order.epoch(0);
		expect(rowsOf(steps, 1).flat()).toEqual([...order.epoch(1)]);
		expect(rowsOf(steps, 0).flat()).toEqual([...before]);
		expect(order.epoch(0)).toBe(before);
		await steps.prepare(3);
		expect(asked.includes(4)).toBe(false);
	});

	it("packs an epoch once, also where the last one is looked at again", () => {
		const packed: number[] = [];
		const order = createOrder({ rows: 6, seed: 1, strategy: "sequential" });
		const pack = (rows: Uint32Array) => {
			packed.push(rows.length);
			return [Uint32Array.of(0, 1, 2), Uint32Array.of(3, 4, 5)];
		};
		const steps = new StepPlan(
			(epoch) => epochBatches(order, epoch, { batchSize: 1, packed: { maxTokens: 10, pack } }),
			{ maxSteps: -1, numTrainEpochs: 2, gradientAccumulationSteps: 1 },
			false,
		);
		for (const step of [0, 2, 1, 3, 0, 2]) expect(rowsOf(steps, step)).toHaveLength(1);
		expect(packed).toEqual([6, 6]);
	});
});
