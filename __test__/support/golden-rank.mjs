// One rank of a golden case: `golden-rank.mjs JOB`, a JSON of the cases that all ranks train one after the other. Of each, rank 0
// prints a line with losses, norms, and the losses of the first step's sequences; what is saved goes into folders.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { launchOf } from "../../dist/launch/launch.js";
import { mpiLibraries } from "../../dist/launch/mpi.js";
import { loadNative } from "../../dist/native.js";
import { NO_HOOKS } from "../../dist/ranks/open.js";

/** The numbers of a file of 64-bit integers, by name. */
function integers(file) {
	const bytes = readFileSync(file);
	const start = 8 + Number(bytes.readBigUInt64LE(0));
	const header = JSON.parse(bytes.toString("utf8", 8, start));
	return (name) => {
		const [from, to] = header[name].data_offsets.map((offset) => start + offset);
		return Int32Array.from({ length: (to - from) / 8 }, (_, i) => Number(bytes.readBigInt64LE(from + 8 * i)));
	};
}

/** Each sequence of a batch as a micro-batch; or all as one, of a model whose balance loss is a micro-batch's own. */
function microBatches(of, asOne) {
	const [ids, targets, positions, ends] = ["input_ids", "labels", "position_ids", "cu_seqlens"].map(of);
	if (asOne) return [{ inputIds: ids, targets, positions, cuSeqlens: ends }];
	return Array.from({ length: ends.length - 1 }, (_, i) => {
		const [from, to] = [ends[i], ends[i + 1]];
		const part = (values) => values.slice(from, to);
		return {
			inputIds: part(ids),
			targets: part(targets),
			positions: part(positions),
			cuSeqlens: Int32Array.of(0, to - from),
		};
	});
}

const launch = launchOf(process.env);
for (const [name, value] of Object.entries(NO_HOOKS)) process.env[name] ??= value;
const native = loadNative();
const { rank, world, launcher } = launch;
for (const { model, out, zero, mesh } of JSON.parse(process.argv[2])) {
	const { tpSize = 1, cpSize = 1, ppSize = 1 } = mesh;
	const data = world / (tpSize * cpSize * ppSize);
	const curve = JSON.parse(readFileSync(join(model, "curve.json"), "utf8"));
	const { output_router_logits = false } = JSON.parse(readFileSync(join(model, "config.json"), "utf8"));
	const batches = microBatches(integers(join(model, "batch.safetensors")), output_router_logits);
	const own = batches.filter((_, i) => i % data === Math.floor(rank / (tpSize * cpSize)) % data);
	const { betas, eps, weight_decay, max_grad_norm } = curve.optimizer;
	const options = {
		modelDir: model,
		device: "cpu",
		dtype: "f32",
		recompute: "norms",
		lossSeqChunkSize: 37,
		maxTokens: Math.max(...batches.map(({ inputIds }) => inputIds.length)),
		maxSequences: Math.max(...batches.map(({ cuSeqlens }) => cuSeqlens.length - 1)),
		adamBeta1: betas[0],
		adamBeta2: betas[1],
		adamEpsilon: eps,
		weightDecay: weight_decay,
		threads: 1,
	};
	// One MPI serves all cases: it can be opened once.
	globalThis.ranks ??= await native.Ranks.open(mpiLibraries(launcher, process.env), rank, world, launcher);
	const engine = await native.Engine.open({ ...options, dataParallel: data, zero, ...mesh, rank });
	await engine.joinRanks(globalThis.ranks);
	const steps = [];
	for (const { lr } of curve.steps) {
		const stats = await engine.finishStep(
			await engine.submitStep(own, { learningRate: lr, maxGradNorm: max_grad_norm }),
		);
		steps.push(stats);
		if (steps.length === 1) await engine.saveState(join(out, "pieces"));
	}
	await engine.exportModel(join(out, "model"));
	await engine.close();
	if (rank > 0) continue;
	// One rank reads the first step's moments, and writes them whole.
	const one = await native.Engine.open(options);
	await one.restoreState(join(out, "pieces"));
	await one.saveState(join(out, "whole"));
	await one.close();
	const figures = steps.map(({ loss, gradNorm }) => [loss, gradNorm]);
	console.log(JSON.stringify({ out, figures, sequences: steps[0].sequenceLosses.flat() }));
}
await globalThis.ranks.close();
