/**
 * A model of the time of a step on GPUs, for `arl plan --nodes`: from what the engine plans for each rank (memory, bytes that it
 * sends) and a few constants. It has been held against no measurement: it says which of two meshes is likely to be faster, and why.
 */
import { above1, MESH_NAMES, type MeshSizes, replicaOf, slicesOf, stageOf, worldOf } from "../config/mesh.js";
import { ArlError } from "../errors.js";
import type { EngineOptions, Native } from "../native.js";
import { ofEveryStage } from "../run/setup/memory.js";
import { meshOptions, type ResolvedConfig, zeroOf } from "../run/setup/options.js";
import { roomOf } from "./plan-memory.js";

/** What the model assumes; shown next to its numbers. */
export const CONSTANTS = {
	/** FLOP/s of an H100 in bf16, without sparsity. */
	peak: 989e12,
	/** The part of it that matrix products, norms and attention reach together: of a dense model, and of a mixture of experts. */
	reached: { dense: 0.55, experts: 0.35 },
	/** Bytes/s of a GPU to others of its node, by NVLink 4. */
	withinNode: 370e9,
	/** Bytes/s of a 400 Gb/s card, of which each GPU has one to other nodes; exchanges of whole nodes use all of them. */
	betweenNodes: 45e9,
	/** The part of the computation behind which gradients and weights can travel. */
	hides: 0.85,
	/** Gigabytes of a GPU. */
	gigabytes: 80,
} as const;

/**
 * Computation, as a multiple of that without recomputation: `block` repeats the forward pass, as all stages of a pipeline but the
 * last do anyway; `mlp` most of it.
 */
const RECOMPUTED = { off: 1, norms: 1, mlp: 1.2, block: 4 / 3 } as const;

/** The most ranks along an axis that is tried. */
const MOST = 8;

/** What the model says of a mesh. */
export interface MeshTime {
	sizes: MeshSizes;
	zero: number;
	/** Of the rank that needs most. */
	memoryBytes: number;
	fits: boolean;
	/** Seconds of a step: of computation, of what is sent and cannot hide behind it, and of stages that wait for others. */
	computeSeconds: number;
	exposedSeconds: number;
	bubbleSeconds: number;
	/** Of each GPU. */
	tokensPerSecond: number;
	/** Model FLOPs per second as a part of the peak. */
	mfu: number;
}

/** The mesh that was asked for, and those that the model finds fastest. */
export interface TimePlan {
	nodes: number;
	asked: MeshTime;
	/** The fastest that fit, at most three, the fastest first. */
	best: MeshTime[];
}

export interface TimeInput {
	native: Pick<Native, "planMemory" | "planTraffic">;
	args: ResolvedConfig;
	/** Of the mesh that was asked for. */
	options: EngineOptions;
	modelType: string;
	nodes: number;
}

/**
 * @throws ArlError `ARL_CONFIG` where ranks do not fill nodes evenly.
 */
export function planTime({ native, args, options, modelType, nodes }: TimeInput): TimePlan {
	const world = worldOf(args);
	if (world % nodes !== 0)
		throw new ArlError("ARL_CONFIG", `nodes is ${nodes}, and does not divide ${world} ranks`, "Give a divisor.");
	const timeOf = (sizes: MeshSizes) => meshTime(native, { ...args, ...sizes }, options, modelType, world / nodes);
	const asked = timeOf(args);
	const found = candidates(world, nodes).flatMap((sizes) => {
		try {
			return [timeOf(sizes)];
		} catch (error) {
			// What the model cannot be divided into, the engine refuses.
			if (error instanceof ArlError && error.code === "ARL_CONFIG") return [];
			throw error;
		}
	});
	const fitting = found.filter(({ fits }) => fits);
	return { nodes, asked, best: fitting.sort((a, b) => b.tokensPerSecond - a.tokensPerSecond).slice(0, 3) };
}

/** Meshes of so many ranks that are worth a look: few ranks along each axis, not all axes at once, and a replica a node or one in all. */
function candidates(world: number, nodes: number): MeshSizes[] {
	const sizes = [1, 2, 4, MOST];
	const found: MeshSizes[] = [];
	for (const tp_size of sizes)
		for (const cp_size of sizes)
			for (const ep_size of sizes)
				for (const pp_size of sizes) {
					const dp_size = world / (tp_size * cp_size * pp_size);
					const mesh = { dp_size, dp_replicate_size: 1, tp_size, cp_size, ep_size, pp_size };
					const whole = Number.isInteger(dp_size) && stageOf(mesh) % ep_size === 0;
					if (!whole || above1(mesh, MESH_NAMES).length > 2) continue;
					found.push(mesh);
					const replicated = { ...mesh, dp_replicate_size: nodes };
					const divides = dp_size % nodes === 0 && replicaOf(replicated) % ep_size === 0;
					if (nodes > 1 && pp_size === 1 && divides) found.push(replicated);
				}
	return found;
}

function meshTime(
	native: TimeInput["native"],
	args: ResolvedConfig,
	options: EngineOptions,
	modelType: string,
	perNode: number,
): MeshTime {
	const world = worldOf(args);
	const rounds = args.gradient_accumulation_steps;
	const { dpReplicateSize: _r, tpSize: _t, cpSize: _c, epSize: _e, ppSize: _p, ...rest } = options;
	const divided = { ...rest, device: "cuda", dataParallel: args.dp_size, ...meshOptions(args) };
	const either = args.zero === "auto" && args.ep_size * args.tp_size * args.pp_size * args.dp_replicate_size === 1;
	const zeros = either ? [2, 3] : [zeroOf(args)];
	const times = zeros.map((zero) => {
		const engine = { ...divided, zero };
		const plan = ofEveryStage(native.planMemory)(engine);
		const sent = native.planTraffic(engine, rounds);
		const { peak, reached, withinNode, betweenNodes, hides, gigabytes } = CONSTANTS;
		const { maxTokens, maxSequences } = options;
		const flops = maxTokens * (plan.flopsPerToken + (plan.attentionFlops * maxTokens) / maxSequences);
		const mine = (rounds * flops) / (slicesOf(args) * args.pp_size);
		const part = modelType.includes("moe") ? reached.experts : reached.dense;
		const recomputed = RECOMPUTED[args.pp_size > 1 ? "block" : args.gradient_checkpointing];
		const computeSeconds = (mine * recomputed) / (peak * part);
		const stageInNode = stageOf(args) <= perNode && perNode % stageOf(args) === 0;
		const all = stageInNode ? withinNode : betweenNodes * perNode;
		const replica = replicaOf(args) <= perNode && perNode % replicaOf(args) === 0 ? withinNode : all;
		const replicas = stageInNode ? withinNode : betweenNodes;
		const near = slicesOf(args) <= perNode && args.ep_size <= perNode && (args.pp_size === 1 || world <= perNode);
		const updates = (sent.gradients + sent.sums) / all + sent.weights / replica + sent.replicas / replicas;
		const hidden = Math.max(0, updates - hides * computeSeconds);
		const exposedSeconds = hidden + sent.tokens / (near ? withinNode : betweenNodes);
		const bubbleSeconds = (computeSeconds * (args.pp_size - 1)) / rounds;
		const seconds = computeSeconds + exposedSeconds + bubbleSeconds;
		return {
			sizes: args,
			zero,
			memoryBytes: plan.totalBytes,
			fits: plan.totalBytes <= roomOf(gigabytes),
			computeSeconds,
			exposedSeconds,
			bubbleSeconds,
			tokensPerSecond: (maxTokens * rounds * args.dp_size) / (seconds * world),
			mfu: mine / (seconds * peak),
		};
	});
	// As a run by itself: what is divided less, where it fits.
	return (times.find(({ fits }) => fits) ?? times.at(-1)) as MeshTime;
}
