/** The model of time behind `arl plan --nodes`: its formulas on a core whose numbers are round, and what it leaves out. */
import { describe, expect, it } from "vitest";
import { CONSTANTS, planTime } from "../src/api/plan-time.js";
import { timeJson, timeText } from "../src/cli/plan-time.js";
import { resolveConfig } from "../src/config/resolve.js";
import { ArlError } from "../src/errors.js";
import type { EngineOptions, MemoryPlan } from "../src/native.js";
import { engineOptions, resolveForDevice } from "../src/run/setup/options.js";

const FLOPS = 6e9;

/** `sent`: bytes of gradients; `weights`: of a replica's ranks, with zero 3; `tokens`: of activations, where ranks divide heads. */
function timesOf(
	options: Record<string, unknown>,
	{ nodes = 1, sent = 0, weights = 0, tokens = 0, memory = 1e9, world = 8 },
) {
	const given = { model_name_or_path: "m", output_dir: "o", device: "cpu", bf16: true, ...options };
	const { args } = resolveForDevice(
		resolveConfig([{ origin: "code", values: Object.entries(given) }], world).args,
		"cpu",
	);
	const native = {
		planMemory: ({ tpSize = 1, cpSize = 1, epSize = 1, ppSize = 1 }: EngineOptions) => {
			// A model of two key heads and two layers, without experts.
			if (tpSize * cpSize > 2 || epSize > 1 || ppSize > 2) throw new ArlError("ARL_CONFIG", "does not divide");
			const totalBytes = memory / (tpSize * ppSize);
			return { totalBytes, flopsPerToken: FLOPS, attentionFlops: 0 } as MemoryPlan;
		},
		planTraffic: ({ tpSize = 1, zero, dpReplicateSize = 1 }: EngineOptions, rounds: number) => ({
			gradients: rounds * sent,
			sums: 0,
			weights: zero === 3 ? rounds * weights : 0,
			replicas: dpReplicateSize > 1 ? weights / 8 : 0,
			tokens: tpSize > 1 ? rounds * tokens : 0,
		}),
	};
	const size = { maxTokens: 8000, maxSequences: 1 };
	return planTime({ native, args, options: engineOptions(args, "cpu", size), modelType: "qwen3", nodes });
}

/** Seconds in which a GPU computes a micro-batch. */
const MICRO_BATCH = (8000 * FLOPS) / (CONSTANTS.peak * CONSTANTS.reached.dense);

describe("the model of a step's time", () => {
	it("is computation alone where gradients hide behind it: what is reached of the peak", () => {
		const { asked, best } = timesOf({ gradient_accumulation_steps: 4 }, {});
		expect(asked.computeSeconds).toBeCloseTo(4 * MICRO_BATCH, 9);
		expect([asked.exposedSeconds, asked.bubbleSeconds, asked.zero]).toEqual([0, 0, 2]);
		expect(asked.mfu).toBeCloseTo(CONSTANTS.reached.dense, 9);
		expect(asked.tokensPerSecond).toBeCloseTo(8000 / MICRO_BATCH, 3);
		expect(best.map(({ sizes }) => sizes.pp_size)).not.toContain(4);
		expect(best).toHaveLength(3);
		const again = timesOf({ gradient_accumulation_steps: 4, gradient_checkpointing: "block" }, {}).asked;
		expect(again.mfu / asked.mfu).toBeCloseTo(3 / 4, 9);
	});

	it("adds what cannot hide, by the wires that it takes: within a node, and between nodes", () => {
		const sent = 2 * CONSTANTS.withinNode * MICRO_BATCH;
		const rounds = 8;
		const options = { gradient_accumulation_steps: rounds };
		const { asked } = timesOf(options, { sent });
		expect(asked.exposedSeconds).toBeCloseTo(rounds * MICRO_BATCH * (2 - CONSTANTS.hides), 9);
		const two = timesOf(options, { sent, nodes: 4 }).asked;
		const wires = CONSTANTS.withinNode / (2 * CONSTANTS.betweenNodes);
		expect(two.exposedSeconds).toBeCloseTo(rounds * MICRO_BATCH * (2 * wires - CONSTANTS.hides), 9);
		const tokens = CONSTANTS.withinNode * MICRO_BATCH;
		const heads = timesOf({ ...options, tp_size: 2 }, { tokens }).asked;
		expect(heads.exposedSeconds).toBeCloseTo(rounds * MICRO_BATCH, 9);
		expect(heads.computeSeconds).toBeCloseTo((rounds * MICRO_BATCH) / 2, 9);
	});

	it("counts how long stages wait, and prefers meshes that fit", () => {
		const stages = timesOf({ pp_size: 2, gradient_accumulation_steps: 4 }, {}).asked;
		expect(stages.bubbleSeconds).toBeCloseTo(stages.computeSeconds / 4, 9);
		// 150 GB fit GPUs of 80 GB in two parts or four.
		const { asked, best } = timesOf({ gradient_accumulation_steps: 16 }, { memory: 150e9, tokens: 1 });
		expect([asked.fits, asked.zero]).toEqual([false, 3]);
		const [fastest] = best;
		expect(fastest?.sizes).toMatchObject({ dp_size: 4, tp_size: 2, cp_size: 1, ep_size: 1, pp_size: 1 });
		expect(best.every(({ fits, sizes }) => fits && sizes.tp_size * sizes.pp_size > 1)).toBe(true);
		expect(timesOf({}, { memory: 1e12 }).best).toEqual([]);
	});

	it("has replicas gather weights within a node, and says which meshes have one a node", () => {
		const weights = 2 * CONSTANTS.withinNode * MICRO_BATCH;
		const given = { gradient_accumulation_steps: 4, zero: 3 };
		const sizes = { nodes: 2, weights };
		const across = timesOf(given, sizes).asked;
		const { asked: within, best } = timesOf({ ...given, dp_replicate_size: 2 }, sizes);
		const wires = CONSTANTS.withinNode / CONSTANTS.betweenNodes;
		const exposed = (multiple: number) => 4 * MICRO_BATCH * (multiple - CONSTANTS.hides);
		expect(across.exposedSeconds).toBeCloseTo(exposed((2 * wires) / 4), 9);
		expect(within.exposedSeconds).toBeCloseTo(exposed(2 + (2 * wires) / 32), 9);
		expect(best[0]?.sizes).toMatchObject({ dp_size: 8, dp_replicate_size: 2 });
		expect(timeText({ nodes: 2, asked: within, best })).toContain("dp_size 8, 2 replicas");
		expect(timesOf({ gradient_accumulation_steps: 4, dp_replicate_size: 2 }, sizes).asked.zero).toBe(3);
	});

	it("says that it is none, and what it assumes", () => {
		const time = timesOf({}, { nodes: 2 });
		const text = timeText(time);
		expect(text).toContain("on 2 nodes of H100s; nothing of it is measured");
		for (const word of ["989 TFLOP/s", "0.55", "0.35", "370 GB/s", "45 GB/s", "0.85", "asked for dp_size 8"])
			expect(text).toContain(word);
		expect(timeJson(time)).toMatchObject({ measured: false, nodes: 2, constants: CONSTANTS, asked: { dp_size: 8 } });
		expect(() => timesOf({}, { nodes: 3 })).toThrow("nodes is 3, and does not divide 8 ranks");
	});
});
