/** Options of a mesh: what is left for data parallelism, and what is refused before anything is opened. */
import { describe, expect, it } from "vitest";
import { meshText } from "../src/config/mesh.js";
import { resolveConfig } from "../src/config/resolve.js";
import type { AgentTrainingConfigInput } from "../src/config/schema.js";
import { ArlError } from "../src/errors.js";
import type { EngineOptions, MemoryPlan } from "../src/native.js";
import { ofEveryStage } from "../src/run/setup/memory.js";
import { resolveForDevice, zeroOf, zeroText } from "../src/run/setup/options.js";

type Options = Partial<AgentTrainingConfigInput>;

const REQUIRED = { model_name_or_path: "m", output_dir: "o", train_file: "f" };

function resolved(options: Options, world?: number | null) {
	return resolveConfig([{ origin: "flag", values: Object.entries({ ...REQUIRED, ...options }) }], world);
}

function refusal(options: Options, world: number | null): ArlError {
	try {
		resolved(options, world);
	} catch (error) {
		if (error instanceof ArlError) return error;
	}
	throw new Error("nothing was refused");
}

describe("dp_size", () => {
	it("is what the other sizes leave of the ranks that were started", () => {
		const left = (world: number | null, options: Options) => resolved(options, world).args.dp_size;
		expect(left(8, {})).toBe(8);
		expect(left(8, { tp_size: 2 })).toBe(4);
		expect(left(12, { tp_size: 2, cp_size: 3, pp_size: 2, ep_size: 6 })).toBe(1);
		expect(left(8, { ep_size: 4 })).toBe(8);
		expect(left(8, { dp_size: 4, pp_size: 2 })).toBe(4);
		// One command starts them.
		expect(left(1, { nproc_per_node: 4, cp_size: 2 })).toBe(2);
		// Where nobody knows how many there will be.
		expect(left(null, { tp_size: 2 })).toBe(1);
	});
});

describe("a mesh is refused, with both numbers and what to do,", () => {
	it.each<[string, number | null, Options, string]>([
		["for another number of ranks", 4, { dp_size: 3 }, "dp_size is 3, and 4 ranks were started"],
		["where they are not divided", 4, { tp_size: 3 }, "tp_size 3 makes 3 ranks, and 4 ranks were started"],
		["where one is alone", 1, { pp_size: 2 }, "pp_size 2 makes 2 ranks, and this process trains alone"],
		[
			"where all sizes are given and are others",
			4,
			{ dp_size: 2, tp_size: 2, pp_size: 2 },
			"pp_size 2 x dp_size 2 x tp_size 2 makes 8 ranks, and 4 ranks were started",
		],
		[
			"where experts do not divide a stage",
			6,
			{ ep_size: 4, cp_size: 2 },
			"ep_size 4 (a flag) does not divide the ranks of a stage, dp_size 3 x cp_size 2 x tp_size 1 = 6",
		],
		["with zero 0", 2, { tp_size: 2, zero: 0 }, "zero 0 (a flag) contradicts tp_size 2 (a flag)"],
		["with zero 2", 4, { dp_replicate_size: 2, zero: 2 }, "zero 2 (a flag) contradicts dp_replicate_size 2 (a flag)"],
		[
			"with stages",
			4,
			{ dp_replicate_size: 2, pp_size: 2 },
			"pp_size 2 (a flag) contradicts dp_replicate_size 2 (a flag)",
		],
		["where replicas differ", 3, { dp_replicate_size: 2 }, "dp_replicate_size 2 (a flag) does not divide dp_size 3"],
		[
			"where a replica lacks experts",
			4,
			{ dp_replicate_size: 2, ep_size: 4 },
			"ep_size 4 (a flag) does not divide the 2 ranks of a replica",
		],
		["with zero 3", 2, { pp_size: 2, zero: 3 }, "zero 3 (a flag) contradicts pp_size 2 (a flag)"],
	])("%s", (_, world, options, message) => {
		const error = refusal(options, world);
		expect(error.code).toBe("ARL_CONFIG");
		expect(error.message).toContain(message);
		expect(error.message.split("\n").length).toBe(1);
		expect(error.hint.length).toBeGreaterThan(20);
	});

	it("but not where ranks divide tokens alone or evaluate, nor by a command that trains nothing", () => {
		const evaluates: Options = { eval_file: ["h.jsonl"], eval_strategy: "epoch", use_peft: true, zero: 0 };
		expect(resolved({ ...evaluates, cp_size: 2 }, 4).args.dp_size).toBe(2);
		expect(resolved({ ...evaluates, tp_size: 2, ep_size: 3 }).args.tp_size).toBe(2);
		const generates: Options = { eval_file: ["h.jsonl"], eval_strategy: "epoch", eval_generate: 2 };
		expect(resolved({ ...generates, tp_size: 2, pp_size: 2 }, 4).args.eval_generate).toBe(2);
		expect(resolved({ tp_size: 2, zero: 3, device: "cpu", images: "train" }, 2).notices).toEqual([]);
		const adapted = resolved({ tp_size: 2, pp_size: 2, use_peft: true, load_in_4bit: true, device: "cpu" }, 4);
		expect(adapted.notices).toEqual([]);
	});

	it("divides weights where there are replicas, and nobody has said otherwise", () => {
		const taken = (options: Options) => zeroOf(resolved(options, 4).args);
		expect([taken({}), taken({ dp_replicate_size: 2 }), taken({ dp_replicate_size: 2, zero: 3 })]).toEqual([2, 3, 3]);
		const { args } = resolved({ dp_replicate_size: 2, ep_size: 2 }, 8);
		expect(meshText(args)).toBe(
			"a mesh of 8 ranks: dp_size 8; ep_size 2 of the 8 ranks of a stage; 2 replicas of 4 ranks",
		);
		expect(zeroText(args, 3)).toMatch(/^zero 3 \(auto\): .* among them, weights within each of 2 replicas$/);
	});

	it("where `auto` turns out to be a GPU", () => {
		const { args } = resolved({ cp_size: 2, ep_size: 2, device: "cuda" }, 2);
		expect(resolveForDevice(args, "cuda:0").args).toMatchObject({ cp_size: 2, ep_size: 2, bf16: true });
	});
});

describe("memory", () => {
	it("is that of the stage that needs most", () => {
		const asked: (number | undefined)[] = [];
		const plan = ofEveryStage(({ rank }) => {
			asked.push(rank);
			return { totalBytes: rank === 6 ? 9 : 5 } as MemoryPlan;
		});
		const options = { dataParallel: 1, tpSize: 2, cpSize: 3, ppSize: 3 } as EngineOptions;
		expect([plan(options).totalBytes, asked]).toEqual([9, [0, 6, 12]]);
		expect([plan({ ...options, ppSize: 1 }).totalBytes, asked.length]).toEqual([5, 4]);
	});
});
