/**
 * From the order of rows to micro-batches, steps and epochs, counted as Hugging Face's Trainer counts them: if the last
 * micro-batches of an epoch are fewer than `gradient_accumulation_steps`, they are a step of their own.
 */
import { ArlError } from "../../errors.js";
import { RecentEpochs, type RowOrder } from "./order.js";

/** One epoch cut into micro-batches of row numbers. */
export interface EpochBatches {
	readonly length: number;
	/** Row numbers of micro-batch `index`. */
	rows(index: number): Uint32Array;
	/** Computes the rows before they are asked for; absent: that is not needed. */
	prepare?(): Promise<void>;
}

/** How rows become micro-batches. */
export interface BatchOptions {
	/** Samples of a micro-batch, unless packed. */
	batchSize: number;
	/** Packing; needs every row's length. */
	packed?: {
		maxTokens: number;
		/** Groups positions of `rows` so that each group has at most `maxTokens` tokens. */
		pack: (rows: Uint32Array, maxTokens: number) => Uint32Array[];
	};
}

/** Rows that are packed at a time. Best fit wastes little within such a window; windows keep the order of the epoch. */
const PACK_WINDOW_ROWS = 4096;

/** The micro-batches of an epoch, a pure function of its arguments. */
export function epochBatches(order: RowOrder, epoch: number, options: BatchOptions): EpochBatches {
	const { packed, batchSize } = options;
	if (!packed) {
		return {
			length: Math.ceil(order.rowsPerEpoch / batchSize),
			// Their number is known without an order: nothing is shuffled before the first row is read.
			rows: (index) => order.epoch(epoch).slice(index * batchSize, (index + 1) * batchSize),
			prepare: () => order.prepare(epoch),
		};
	}
	const rows = order.epoch(epoch);
	const batches: Uint32Array[] = [];
	for (let at = 0; at < rows.length; at += PACK_WINDOW_ROWS) {
		const window = rows.slice(at, at + PACK_WINDOW_ROWS);
		const groups = packed
			.pack(window, packed.maxTokens)
			.map((positions) => positions.map((position) => window[position] as number));
		batches.push(...groups);
	}
	return { length: batches.length, rows: (index) => batches[index] as Uint32Array };
}

/** A step's place in the run. */
export interface StepPlace {
	epoch: number;
	/** Micro-batches [first, end) of the epoch. */
	first: number;
	end: number;
	/** Micro-batches of the whole epoch. */
	batchesInEpoch: number;
	/** The epoch ends with this step. */
	lastOfEpoch: boolean;
}

export interface RunLength {
	/** Above 0: overrides the epochs. */
	maxSteps: number;
	/** May be a fraction. */
	numTrainEpochs: number;
	gradientAccumulationSteps: number;
}

/** All steps of a run by number. Epochs are cut as they are asked for. */
export class StepPlan {
	/** First step of each epoch. */
	private readonly epochStarts: number[] = [0];
	readonly totalSteps: number;
	private readonly kept = new RecentEpochs<EpochBatches>();
	/** The last epoch that was prepared before its first step. */
	private ahead = 0;

	/** `sameEveryEpoch`: all epochs have as many micro-batches as the first; not so when packed. */
	constructor(
		private readonly batchesOf: (epoch: number) => EpochBatches,
		private readonly length: RunLength,
		private readonly sameEveryEpoch: boolean,
	) {
		const { maxSteps, numTrainEpochs } = length;
		if (this.stepsOf(0) === 0) throw new ArlError("ARL_DATA", "no row is left to train on");
		if (maxSteps > 0) {
			this.totalSteps = maxSteps;
			return;
		}
		const whole = Math.floor(numTrainEpochs);
		// Hugging Face: ceil(epochs x steps per epoch); here each epoch may have its own number of steps.
		if (sameEveryEpoch) this.totalSteps = Math.ceil(numTrainEpochs * this.stepsOf(0));
		else {
			const before = this.startOf(whole);
			// An epoch that is not trained is not packed either.
			const part = numTrainEpochs > whole ? (numTrainEpochs - whole) * this.stepsOf(whole) : 0;
			this.totalSteps = before + Math.ceil(part);
		}
	}

	/** The micro-batches of an epoch. */
	batches(epoch: number): EpochBatches {
		return this.kept.get(epoch) ?? this.kept.set(epoch, this.batchesOf(epoch));
	}

	/** Resolves when the rows of step `step` (from 0) are known, and starts to prepare the next epoch; neither blocks. */
	async prepare(step: number): Promise<void> {
		const { epoch } = this.place(step);
		await this.batches(epoch).prepare?.();
		const next = epoch + 1;
		if (!this.sameEveryEpoch || next <= this.ahead || this.startOf(next) >= this.totalSteps) return;
		this.ahead = next;
		this.batches(next)
			.prepare?.()
			// A failure surfaces again in the step that needs the epoch.
			.catch(() => {});
	}

	/** Steps of an epoch. */
	stepsOf(epoch: number): number {
		const known = this.sameEveryEpoch ? 0 : epoch;
		const start = this.epochStarts[known];
		const next = this.epochStarts[known + 1];
		if (start !== undefined && next !== undefined) return next - start;
		const steps = Math.ceil(this.batches(epoch).length / this.length.gradientAccumulationSteps);
		if (start !== undefined) this.epochStarts.push(start + steps);
		return steps;
	}

	/** First step of an epoch. */
	private startOf(epoch: number): number {
		if (this.sameEveryEpoch) return epoch * this.stepsOf(0);
		for (let known = this.epochStarts.length - 1; known < epoch; known++) this.stepsOf(known);
		return this.epochStarts[epoch] as number;
	}

	/** The place of step `step` (from 0). */
	place(step: number): StepPlace {
		let epoch = 0;
		if (this.sameEveryEpoch) epoch = Math.floor(step / this.stepsOf(0));
		else while (this.startOf(epoch + 1) <= step) epoch += 1;
		const inEpoch = step - this.startOf(epoch);
		const batchesInEpoch = this.batches(epoch).length;
		const first = inEpoch * this.length.gradientAccumulationSteps;
		const end = Math.min(first + this.length.gradientAccumulationSteps, batchesInEpoch);
		return { epoch, first, end, batchesInEpoch, lastOfEpoch: end === batchesInEpoch };
	}

	/** Row numbers of each micro-batch of step `step` (from 0). */
	rows(step: number): Uint32Array[] {
		const { epoch, first, end } = this.place(step);
		const batches = this.batches(epoch);
		return Array.from({ length: end - first }, (_, i) => batches.rows(first + i));
	}
}

/** Epochs done after `place`, with fraction, as Hugging Face logs it. */
export function epochAfter(place: StepPlace): number {
	return place.epoch + place.end / place.batchesInEpoch;
}
