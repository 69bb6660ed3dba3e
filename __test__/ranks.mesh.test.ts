/** Ranks that divide tokens, heads, experts and layers, on the real core: the losses of one rank, and checkpoints that any mesh reads. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import type { Mpirun } from "../src/launch/mpi.js";
import { eightSteps, LIMIT, type Options } from "./support/eight-steps.js";
import { temporaryFolder } from "./support/folder.js";
import { arlOnRanks, mpiruns } from "./support/ranks.js";
import { arl, type Ended, flags, metricsOf, root } from "./support/real.js";

const found = mpiruns();
const first = found[0] as Mpirun;
const folder = temporaryFolder();
const { place, train } = eightSteps(folder, { gradient_accumulation_steps: 4, save_steps: 4 });

/** A layer with a dense MLP and one with experts; each axis of a mesh divides something by two. */
const config = JSON.parse(readFileSync(join(place.model, "config.json"), "utf8"));
const heads = { num_attention_heads: 4, num_key_value_heads: 2 };
const experts = { num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, norm_topk_prob: true };
const sparse = { decoder_sparse_step: 1, mlp_only_layers: [0], router_aux_loss_coef: 0.01, output_router_logits: true };
const kind = { model_type: "qwen3_moe", architectures: ["Qwen3MoeForCausalLM"], dtype: "float32" };
writeFileSync(
	join(place.model, "config.json"),
	JSON.stringify({ ...config, ...heads, ...experts, ...sparse, ...kind }),
);

/** A few held-out rows, whose loss and replies are of the middle and of the end of a run. */
const heldout = readFileSync(join(root, "assets", "heldout.jsonl"), "utf8")
	.split("\n")
	.slice(0, 5);
writeFileSync(join(folder, "heldout.jsonl"), heldout.join("\n"));
const EVALUATES: Options = {
	eval_file: join(folder, "heldout.jsonl"),
	eval_strategy: "steps",
	eval_steps: 4,
	eval_generate: 1,
};

function succeeded(run: Ended): void {
	expect(run.code, run.stderr).toBe(0);
}

/** The lines of a run's steps. */
const stepsOf = (out: string) => metricsOf(out).filter((line) => line.loss !== undefined);

/** Expects the evaluations of one rank, within 1e-4. Replies of a model that has learned next to nothing are all wrong. */
function sameEvaluations(out: string, reference: string): void {
	const of = (folder: string) => metricsOf(folder).filter((line) => line.eval_loss !== undefined);
	const [ours, theirs] = [of(out), of(reference)];
	expect(ours.map(({ step, eval_exact_match }) => [step, eval_exact_match])).toEqual([
		[4, 0],
		[8, 0],
	]);
	for (const [i, line] of ours.entries()) {
		for (const name of ["eval_loss", "eval_entropy"])
			expect(Math.abs((line[name] ?? Number.NaN) - (theirs[i]?.[name] ?? Number.NaN))).toBeLessThan(1e-4);
	}
	const samples = (folder: string) => metricsOf(folder).filter((line) => line.reply !== undefined).length;
	expect(samples(out)).toBe(samples(reference));
	expect(samples(out)).toBeGreaterThan(1);
}

/** Expects the steps of one rank from step `from` on, within 1e-4. */
function sameSteps(out: string, reference: string, from = 1): void {
	const [ours, theirs] = [stepsOf(out), stepsOf(reference).slice(from - 1)];
	expect(ours.map(({ step, num_tokens }) => [step, num_tokens])).toEqual(
		theirs.map(({ step, num_tokens }) => [step, num_tokens]),
	);
	for (const [i, line] of ours.entries()) {
		for (const name of ["loss", "grad_norm", "entropy"]) {
			const off = Math.abs((line[name] ?? Number.NaN) - (theirs[i]?.[name] ?? Number.NaN));
			expect(off, `${name} of step ${line.step}`).toBeLessThan(1e-4);
		}
	}
}

/** Layout and values of a file of tensors, all of which are f32. */
function tensors(out: string, file: string): { header: string; values: Float32Array } {
	const bytes = readFileSync(join(out, file));
	const length = Number(bytes.readBigUInt64LE(0));
	const values = new Uint8Array(bytes.subarray(8 + length)).buffer;
	return { header: bytes.toString("utf8", 8, 8 + length), values: new Float32Array(values) };
}

/** Expects the same layout, and values within `bound` of the reference's: `||a - b|| / ||b||`. */
function sameModel(out: string, reference: string, bound: number, file = "model.safetensors"): void {
	const [a, b] = [tensors(out, file), tensors(reference, file)];
	expect(a.header).toBe(b.header);
	const norm = (values: Float32Array) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
	const off = norm(a.values.map((value, i) => value - (b.values[i] as number))) / norm(b.values);
	expect(off).toBeLessThan(bound);
	expect(off).not.toBeNaN();
}

/** Meshes by the number of their ranks. */
const MESHES: [number, Options][] = [
	[2, { cp_size: 2 }],
	[2, { tp_size: 2 }],
	[2, { ep_size: 2, gradient_accumulation_steps: 2 }],
	[2, { ep_size: 2, gradient_accumulation_steps: 2, zero: 3 }],
	[2, { pp_size: 2 }],
	[4, { cp_size: 2, pp_size: 2 }],
	[4, { tp_size: 2, gradient_accumulation_steps: 2, ...EVALUATES }],
	[8, { cp_size: 2, pp_size: 2, gradient_accumulation_steps: 2 }],
	[4, { dp_replicate_size: 2, gradient_accumulation_steps: 1, ...EVALUATES }],
];

describe.skipIf(found.length === 0)("ranks of a mesh", () => {
	const reference = train(EVALUATES);
	const outs = new Map<string, string>();
	const key = (options: Options) => JSON.stringify(options);

	beforeAll(async () => {
		succeeded(await arl(reference.args));
	}, LIMIT);

	it.each(MESHES)("have the losses and the model of one rank: %i, %o", { timeout: LIMIT }, async (ranks, options) => {
		const several = train(options);
		const run = await arlOnRanks(first, ranks, several.args);
		succeeded(run);
		outs.set(key(options), several.out);
		expect(run.stderr).toContain(`a mesh of ${ranks} ranks: `);
		sameSteps(several.out, reference.out);
		sameModel(several.out, reference.out, 1e-3);
		if (options.eval_file !== undefined) sameEvaluations(several.out, reference.out);
	});

	it("read what another mesh has saved, and say that results are within rounding", { timeout: LIMIT }, async () => {
		const from = outs.get(key({ tp_size: 2 })) as string;
		const resume = { resume_from_checkpoint: join(from, "checkpoint-4") };
		const one = train(resume);
		succeeded(await arl(one.args));
		const stages = train({ ...resume, pp_size: 2 });
		const run = await arlOnRanks(first, 2, stages.args);
		succeeded(run);
		expect(run.stderr).toContain("the run resumes on another mesh (tp_size 2 -> 1, pp_size 1 -> 2): ");
		for (const { out } of [one, stages]) {
			sameSteps(out, reference.out, 5);
			sameModel(out, reference.out, 1e-3);
		}
		// What one rank or stages have saved, two that divide experts read; and data-parallel ranks what two with half of the heads have.
		const saved = (options: Options) => outs.get(key(options)) as string;
		const readers: [string, Options][] = [
			[reference.out, { ep_size: 2 }],
			[saved({ pp_size: 2 }), { ep_size: 2 }],
			[saved({ tp_size: 2 }), {}],
			[saved({ pp_size: 2 }), { dp_replicate_size: 2 }],
		];
		for (const [writer, reader] of readers) {
			const state = { resume_from_checkpoint: join(writer, "checkpoint-4"), gradient_accumulation_steps: 2 };
			const other = train({ ...reader, ...state });
			succeeded(await arlOnRanks(first, 2, other.args));
			sameSteps(other.out, reference.out, 5);
			sameModel(other.out, reference.out, 1e-3);
		}
	});

	it("have the losses of one rank in f16 too", { timeout: LIMIT }, async () => {
		const one = train({ fp16: true });
		succeeded(await arl(one.args));
		const meshes: [number, Options][] = [
			[2, { tp_size: 2 }],
			[2, { ep_size: 2, gradient_accumulation_steps: 2 }],
			[4, { cp_size: 2, pp_size: 2 }],
		];
		for (const [ranks, options] of meshes) {
			const several = train({ fp16: true, ...options });
			succeeded(await arlOnRanks(first, ranks, several.args));
			sameSteps(several.out, one.out);
		}
	});

	it("train adapters as one rank does", { timeout: LIMIT }, async () => {
		const layers = { use_peft: true, lora_r: 4, lora_target_modules: "all-linear", lora_dropout: 0 };
		const model = { model_name_or_path: reference.out, init_from_config: false, num_train_epochs: 1 };
		const [one, several] = [train({ ...layers, ...model }), train({ ...layers, ...model, tp_size: 2, pp_size: 2 })];
		succeeded(await arl(one.args));
		succeeded(await arlOnRanks(first, 4, several.args));
		sameSteps(several.out, one.out);
		sameModel(several.out, one.out, 1e-3, "adapter_model.safetensors");
	});

	it("are refused once, by rank 0, before anything is opened", { timeout: LIMIT }, async () => {
		const { out, args } = train({ tp_size: 2, zero: 0 });
		const run = await arlOnRanks(first, 2, args);
		expect(run.code, run.stderr).toBe(2);
		expect(run.stderr.match(/zero 0 \(a flag\) contradicts tp_size 2 \(a flag\)/g)).toHaveLength(1);
		expect(() => readFileSync(join(out, "metrics.jsonl"))).toThrow("ENOENT");
	});
});

describe("a mesh that the model does not fit", () => {
	it.each([
		["tp_size", 4, /head/],
		["cp_size", 4, /head/],
		["ep_size", 3, /expert/],
		["pp_size", 3, /layer/],
	])("is refused by the engine's plan: %s %i", { timeout: LIMIT }, async (name, size, what) => {
		const words = flags({ model_name_or_path: place.model, device: "cpu", world: size, [name]: size, tokens: 64 });
		const run = await arl(["plan", ...words]);
		expect(run.code, run.stdout).toBe(2);
		expect(run.stderr).toMatch(what);
		expect(run.stderr).toContain(String(size));
	});
});
