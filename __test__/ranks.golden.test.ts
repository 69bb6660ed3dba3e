/** Golden models on meshes of real ranks, next to what transformers computed on one device: the bounds that one rank has. */
import { mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { type Mpirun, mpirunArguments } from "../src/launch/mpi.js";
import { temporaryFolder } from "./support/folder.js";
import { ended, mpiruns } from "./support/ranks.js";
import { root, sharedPath } from "./support/real.js";

const found = mpiruns();
const folder = temporaryFolder();
const LIMIT = 300_000;

interface Mesh {
	tpSize?: number;
	cpSize?: number;
	epSize?: number;
	ppSize?: number;
}

/** Hybrids amplify rounding from step to step (docs/architecture.md): their curves are compared as far as it is small. */
const AMPLIFIES = /hybrid\/(qwen3-next|qwen3_5-)/;
const STEADY_STEPS = 5;

const TP = { tpSize: 2 };
const CP = { cpSize: 2 };
const EP = { epSize: 2 };
const PP = { ppSize: 2 };

/** The tensors of a file, all of which are f32. */
function tensors(file: string): Map<string, Float32Array> {
	const bytes = readFileSync(file);
	const start = 8 + Number(bytes.readBigUInt64LE(0));
	const header = JSON.parse(bytes.toString("utf8", 8, start)) as Record<string, { data_offsets: [number, number] }>;
	const entries = Object.entries(header).filter(([name]) => name !== "__metadata__");
	return new Map(
		entries.map(([name, { data_offsets }]) => {
			const [from, to] = data_offsets.map((offset) => start + offset);
			return [name, new Float32Array(new Uint8Array(bytes.subarray(from, to)).buffer)];
		}),
	);
}

/** `||a - b|| / ||b||`; 0 where both are equal. */
function difference(a: ArrayLike<number>, b: ArrayLike<number>): number {
	expect(a.length).toBe(b.length);
	let [error, norm] = [0, 0];
	for (let i = 0; i < b.length; i++) {
		error += ((a[i] as number) - (b[i] as number)) ** 2;
		norm += (b[i] as number) ** 2;
	}
	return error === 0 ? 0 : Math.sqrt(error / norm);
}

interface Result {
	/** Loss and norm of the gradients of each step. */
	figures: [number, number][];
	/** In the first step, of each sequence. */
	sequences: number[];
	/** Folder of the trained model. */
	out: string;
}

/** Trains cases of a folder on so many ranks, and compares each with transformers. */
async function match(golden: string, world: number, cases: [string, Mesh, number?][]): Promise<Result[]> {
	const mpirun = found[0] as Mpirun;
	const jobs = cases.map(([name, mesh, zero = 2], i) => {
		const out = join(folder, `${world}-${i}-${name.replaceAll("/", "-")}`);
		for (const part of ["pieces", "whole"]) mkdirSync(join(out, part), { recursive: true });
		return { model: join(golden, name), out, zero, mesh };
	});
	const command = [process.execPath, join(root, "__test__", "support", "golden-rank.mjs"), JSON.stringify(jobs)];
	const run = await ended(mpirun.file, [...mpirunArguments(mpirun, world, process.getuid?.() === 0), ...command], {});
	expect(run.code, run.stderr).toBe(0);
	const lines = run.stdout.split("\n").filter((line) => line.startsWith("{"));
	const results = lines.map((line) => JSON.parse(line) as Result);
	expect(results).toHaveLength(cases.length);
	for (const [i, { model, out, mesh, zero }] of jobs.entries()) {
		const what = `${model} on ${world} ranks, ${JSON.stringify(mesh)}, zero ${zero}`;
		const { figures, sequences } = results[i] as Result;
		const { steps, optimizer } = JSON.parse(readFileSync(join(model, "curve.json"), "utf8"));
		expect(figures, what).toHaveLength(20);
		const isSteady = !AMPLIFIES.test(model);
		for (const [step, [loss, norm]] of figures.slice(0, isSteady ? 20 : STEADY_STEPS).entries()) {
			expect(Math.abs(loss - steps[step].loss), `${what}: loss of step ${step}`).toBeLessThan(1e-4);
			const apart = Math.abs(norm - steps[step].grad_norm) / steps[step].grad_norm;
			expect(apart, `${what}: norm of step ${step}`).toBeLessThan(1e-3);
		}
		// No rank has all logits: the losses of sequences are in their place.
		const nll = tensors(join(model, "forward.safetensors")).get("nll") as Float32Array;
		const file = readFileSync(join(model, "batch.safetensors"));
		const start = 8 + Number(file.readBigUInt64LE(0));
		const [from, to] = JSON.parse(file.toString("utf8", 8, start)).cu_seqlens.data_offsets as [number, number];
		const ends = Array.from({ length: (to - from) / 8 }, (_, e) => Number(file.readBigInt64LE(start + from + 8 * e)));
		const sums = ends.slice(1).map((end, e) => nll.subarray(ends[e], end).reduce((sum, value) => sum + value, 0));
		expect(difference(sequences, sums), `${what}: losses of sequences`).toBeLessThan(1e-4);
		// The first step's first moments are its gradients, clipped, and times what the decay leaves.
		const moments = tensors(join(out, "whole", "engine.safetensors"));
		const gradients = tensors(join(model, "grads.safetensors"));
		const [, norm] = figures[0] as [number, number];
		const factor = (1 - optimizer.betas[0]) * Math.min(1, optimizer.max_grad_norm / norm);
		for (const [name, gradient] of gradients) {
			const moment = moments.get(`moment1/${name}`);
			if (moment === undefined) {
				// Files join these, two by two or all experts of a layer, and the engine has each by itself.
				expect(name, what).toMatch(/linear_attn\.in_proj_(ba|qkvz)\.weight$|mlp\.experts\.(gate_up|down)_proj$/);
				continue;
			}
			const apart = difference(
				moment.map((value) => value / factor),
				gradient,
			);
			expect(apart, `${what}: gradient of ${name}`).toBeLessThan(1e-4);
		}
		const trained = tensors(join(out, "model", "model.safetensors"));
		const expected = tensors(join(model, "trained.safetensors"));
		expect([...trained.keys()].sort(), what).toEqual([...expected.keys()].sort());
		for (const [name, values] of isSteady ? expected : []) {
			const apart = difference(trained.get(name) as Float32Array, values);
			expect(apart, `${what}: trained ${name}`).toBeLessThan(1e-3);
		}
	}
	return results;
}

describe.skipIf(found.length === 0)("golden models of this project on meshes match transformers", () => {
	const golden = join(root, "__test__", "golden");

	/** What data-parallel ranks have of `window-bias`. */
	const dataParallel: Result[] = [];

	// They have one key head, or three.
	it("2 ranks", { timeout: LIMIT }, async () => {
		const results = await match(golden, 2, [
			["window-bias", {}, 1],
			["window-bias", PP],
			["moe-balance", EP],
			["moe-balance", PP],
		]);
		dataParallel.push(results[0] as Result);
	});

	it("3 ranks", { timeout: LIMIT }, async () => {
		const results = await match(golden, 3, [
			["window-bias", {}, 2],
			["qwen2-window", { cpSize: 3 }],
			["moe-top1", { epSize: 3 }, 3],
		]);
		dataParallel.push(results[0] as Result);
	});

	it("4 ranks, and data-parallel ranks in each bit alike", { timeout: LIMIT }, async () => {
		const results = await match(golden, 4, [
			["window-bias", {}, 3],
			["window-bias", PP],
			["moe-balance", EP, 3],
		]);
		dataParallel.push(results[0] as Result);
		expect(dataParallel).toHaveLength(3);
		const weights = ({ out }: Result) => readFileSync(join(out, "model", "model.safetensors"));
		const [first] = dataParallel as [Result];
		for (const other of dataParallel.slice(1)) {
			expect(other.figures).toEqual(first.figures);
			expect(weights(other).equals(weights(first))).toBe(true);
		}
	});
});

const golden = found.length === 0 ? null : sharedPath("golden", "golden models on meshes");

describe.skipIf(golden === null)("shared golden models on meshes match transformers", () => {
	const dense = ["qwen2-tied", "qwen2-untied", "qwen3-tied", "hybrid/qwen3_5-dense"];
	const sparse = ["qwen3-moe", "hybrid/qwen3-next", "hybrid/qwen3_5-moe"];
	// Its five experts are no multiple of two.
	const all = [...dense, ...sparse, "hybrid/qwen3-moe-3d"];
	it.each([2, 4])("%i ranks, every model", { timeout: LIMIT }, async (world) => {
		const cases: [string, Mesh, number?][] = [TP, CP, PP].flatMap((mesh) =>
			all.map((name): [string, Mesh] => [name, mesh]),
		);
		cases.push(...sparse.map((name): [string, Mesh, number] => [name, EP, world === 4 ? 3 : 2]));
		await match(golden as string, world, cases);
	});

	it("4 ranks, two and three axes at once", { timeout: LIMIT }, async () => {
		await match(golden as string, 4, [
			["qwen2-untied", { ...CP, ...TP }],
			["qwen3-moe", { ...CP, ...PP }],
			["qwen3-moe", { ...TP, ...EP, ...PP }],
		]);
	});

	it("8 ranks, three axes at once", { timeout: LIMIT }, async () => {
		await match(golden as string, 8, [
			["qwen2-untied", { ...TP, ...CP, ...PP }],
			["qwen3-moe", { ...CP, epSize: 4, ...PP }],
		]);
	});
});
