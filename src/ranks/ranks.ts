/** The ranks of a run, as the run sees them: those that open and use an engine together. Alone is a rank, too. */
import { availableParallelism, cpus } from "node:os";
import { type MeshSizes, wrongWorld } from "../config/mesh.js";
import { ArlError } from "../errors.js";
import type { EngineOptions, Native, NativeEngine } from "../native.js";
import { deviceOfRank } from "./gpus.js";

/** What `Engine.open` takes. */
export type OpenOptions = EngineOptions;

/** The ranks that train together, seen from rank 0. */
export interface Ranks {
	/** How many there are. */
	readonly world: number;
	/** How many of them share this machine's cores and memory. */
	readonly localWorld: number;
	/** Why these ranks cannot compute on CPUs; null: they can. */
	readonly cpuRefusal: ArlError | null;
	/** Opens the engine on every rank; what this one computes, all compute together. */
	openEngine(native: Native, options: OpenOptions): Promise<NativeEngine>;
}

/** One rank. */
export const ALONE: Ranks = {
	world: 1,
	localWorld: 1,
	cpuRefusal: null,
	openEngine: (native, options) => native.Engine.open(options),
};

/** Compute threads of a rank, of which `localWorld` share this machine. A launcher may have tied it to some cores already. */
export function threadsOf(localWorld: number): number {
	const own = availableParallelism();
	const tied = own < cpus().length;
	return tied ? own : Math.max(1, Math.floor(own / localWorld));
}

/** Checks that as many ranks run as the options say. */
export function checkRanks({ world }: Ranks, sizes: MeshSizes): void {
	const wrong = wrongWorld(sizes, world);
	if (wrong !== null) throw new ArlError("ARL_CONFIG", wrong.line, wrong.hint);
}

/**
 * Checks that several ranks can exchange what they compute on a device. `native`: the addon of its engine.
 *
 * @throws ArlError `ARL_DEVICE` where ranks on CPUs have no MPI, or ranks on GPUs no NCCL; `ARL_CONFIG` where all would use one GPU.
 */
export function checkDevice(
	{ world, localWorld, cpuRefusal }: Pick<Ranks, "world" | "localWorld" | "cpuRefusal">,
	{ wanted, device, native }: { wanted: string; device: string; native: Pick<Native, "ncclReport"> },
): void {
	if (world === 1) return;
	if (device === "cpu") {
		if (cpuRefusal !== null) throw cpuRefusal;
		return;
	}
	deviceOfRank(wanted, [device], { localRank: 0, localWorld });
	const { found, tried, hint } = native.ncclReport();
	if (found !== undefined) return;
	const reasons = tried.filter(({ why }) => why !== "not there").map(({ at, why }) => `; ${at}: ${why}`);
	throw new ArlError(
		"ARL_DEVICE",
		`${world} ranks on GPUs (device ${device}) need NCCL (libnccl.so.2), and there is none${reasons.join("")}`,
		`To get it: ${hint}.`,
	);
}
