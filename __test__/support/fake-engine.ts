/** The engine of the fake core: a "model" of four numbers that each step moves by an exact rule. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import type { EngineOptions, MemoryPlan, MicroBatch, NativeEngine, StepStats } from "../../src/native.js";
import type { Faults } from "./fake-native.js";

const EMPTY_PLAN = {
	parameters: 4,
	trainedParameters: 4,
	flopsPerToken: 24,
	attentionFlops: 1,
	categories: [],
	totalBytes: 0,
	hostCategories: [],
	hostBytes: 0,
};
/** 1 MB of weights, and 100 bytes a token. */
export function smallPlan({ maxTokens }: EngineOptions): MemoryPlan {
	const activations = 100 * maxTokens;
	const categories = [
		{ name: "weights", bytes: 1e6 },
		{ name: "activations", bytes: activations },
	];
	return { ...EMPTY_PLAN, categories, totalBytes: 1e6 + activations };
}

/** An engine in TypeScript, and what a test makes it do. */
export class FakeEngine implements NativeEngine {
	private weights = Float64Array.from([0.1, -0.2, 0.3, 0.4]);
	private moments = new Float64Array(4);
	private steps = 0;
	private readonly submitted: { batches: MicroBatch[]; hyper: { learningRate: number; maxGradNorm: number } }[] = [];
	private calls = 0;
	private lossScale = 65536;
	/** As the real one: read once, when it is opened. */
	private readonly config: Buffer;

	constructor(
		readonly options: EngineOptions,
		private readonly faults: Faults,
	) {
		this.config = readFileSync(join(options.modelDir, "config.json"));
		faults.onOpen?.(options);
	}

	info() {
		return {
			exportChanges: this.faults.exportChanges ?? [],
			parameters: 4,
			trainedParameters: 4,
			modelType: "qwen3",
			vocabSize: 256,
			maxPositionEmbeddings: 4096,
			device: "cpu",
			dtype: "f32",
			flopsPerToken: 24,
			attentionFlops: 2,
			unknownKeys: [],
			...(this.faults.notice !== undefined && { notice: this.faults.notice }),
		};
	}

	async memory() {
		return EMPTY_PLAN;
	}

	async step(batches: MicroBatch[], hyper: { learningRate: number; maxGradNorm: number }): Promise<StepStats> {
		if (this.faults.stepMs) await setTimeout(this.faults.stepMs);
		const forced = this.faults.onStep?.(this.steps + 1, batches);
		const skip = this.faults.skips?.(++this.calls);
		const lossScale = this.options.dtype === "f16" && { lossScale: this.lossScale };
		if (skip) this.lossScale /= 2;
		let sum = 0;
		let targets = 0;
		for (const { inputIds } of batches) {
			for (const [i, id] of inputIds.entries()) sum += Math.sin(id * (i + 1)) * (this.weights[id % 4] as number);
			targets += inputIds.length;
		}
		for (let i = 0; i < 4 && !skip; i++) {
			this.moments[i] = 0.9 * (this.moments[i] as number) + 0.1 * Math.cos(sum + i);
			this.weights[i] = (this.weights[i] as number) - hyper.learningRate * (this.moments[i] as number);
		}
		if (!skip) this.steps += 1;
		return {
			loss: skip?.loss ?? forced ?? sum / targets,
			gradNorm: skip ? Number.POSITIVE_INFINITY : Math.abs(sum),
			...lossScale,
			skipped: skip !== undefined,
			seconds: 0.001,
			sequenceLosses: batches.map(({ cuSeqlens }) => Array.from(cuSeqlens.subarray(1), () => 0)),
			microBatches: batches.map(({ inputIds, cuSeqlens }) => ({
				tokens: inputIds.length,
				targetTokens: inputIds.length - cuSeqlens.length + 1,
				targetWeight: inputIds.length,
				lossSum: 0,
				correct: inputIds.filter((id) => id % 2 === 0).length,
				entropySum: Number.isFinite(skip?.loss ?? 0) ? inputIds.length / 2 : Number.NaN,
				balanceLoss: 0,
			})),
		};
	}

	async submitStep(batches: MicroBatch[], hyper: { learningRate: number; maxGradNorm: number }) {
		const ticket = this.submitted.push({ batches, hyper });
		this.faults.onQueue?.(`submit ${ticket}`);
		return ticket;
	}

	async finishStep(ticket: number) {
		const { batches, hyper } = this.submitted[ticket - 1] as (typeof this.submitted)[number];
		this.faults.onQueue?.(`finish ${ticket}`);
		const stats = await this.step(batches, hyper);
		this.faults.onQueue?.(`finished ${ticket}`);
		return stats;
	}

	async joinRanks() {}

	async fingerprint() {
		return "";
	}

	async serveWeights() {}

	async endServing() {}

	async discardStep() {
		this.faults.onQueue?.("discard");
		this.faults.onDiscard?.();
	}

	async evaluate() {
		return [];
	}

	async evaluateSequences({ inputIds, targets, cuSeqlens }: MicroBatch) {
		if (this.faults.evaluateMs) await setTimeout(this.faults.evaluateMs);
		const forced = this.faults.evalLoss?.(this.steps);
		return Array.from({ length: cuSeqlens.length - 1 }, (_, i) => {
			const [from, to] = [cuSeqlens[i] as number, cuSeqlens[i + 1] as number];
			const targetTokens = targets.subarray(from, to).filter((target) => target >= 0).length;
			let lossSum = 0;
			for (let t = from; t < to; t++)
				lossSum += Math.abs(Math.sin((inputIds[t] as number) + (this.weights[(t - from) % 4] as number)));
			return {
				tokens: to - from,
				targetTokens,
				targetWeight: targetTokens,
				lossSum: forced === undefined ? lossSum : forced * targetTokens,
				correct: 1,
				entropySum: targetTokens / 2,
				balanceLoss: 0,
			};
		});
	}

	async generate() {
		return [];
	}

	async saveState(dir: string) {
		this.faults.onSaveState?.(dir);
		const state = { weights: [...this.weights], moments: [...this.moments], steps: this.steps };
		writeFileSync(join(dir, "engine.json"), JSON.stringify(state));
	}

	async restoreState(dir: string) {
		const state = JSON.parse(readFileSync(join(dir, "engine.json"), "utf8"));
		this.weights = Float64Array.from(state.weights);
		this.moments = Float64Array.from(state.moments);
		this.steps = state.steps;
		return this.faults.restoreNotice ?? null;
	}

	async exportAdapter(): Promise<void> {
		throw new Error("the fake core has no adapters");
	}

	async exportModel(dir: string) {
		this.faults.onExport?.(dir);
		writeFileSync(join(dir, "config.json"), this.config);
		const { exportChatTemplate: template } = this.options;
		if (template !== undefined) writeFileSync(join(dir, "chat_template.jinja"), template);
		writeFileSync(join(dir, "model.safetensors"), JSON.stringify([...this.weights]));
	}

	interrupt() {}
	async close() {
		this.faults.onCloseEngine?.();
	}
}
