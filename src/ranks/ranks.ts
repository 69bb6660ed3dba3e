/** The ranks of a run, as the run sees them: those that open and use an engine together. Alone is a rank, too. */
import { availableParallelism, cpus } from "node:os";
import { ArlError } from "../errors.js";
import type { EngineOptions, Native, NativeEngine } from "../native.js";

/** What `Engine.open` takes. */
export type OpenOptions = EngineOptions;

/** The ranks that train together, seen from rank 0. */
export interface Ranks {
	/** How many there are. */
	readonly world: number;
	/** How many of them share this machine's cores and memory. */
	readonly localWorld: number;
	/** Opens the engine on every rank; what this one computes, all compute together. */
	openEngine(native: Native, options: OpenOptions): Promise<NativeEngine>;
}

/** One rank. */
export const ALONE: Ranks = {
	world: 1,
	localWorld: 1,
	openEngine: (native, options) => native.Engine.open(options),
};

/** Compute threads of a rank, of which `localWorld` share this machine. A launcher may have tied it to some cores already. */
export function threadsOf(localWorld: number): number {
	const own = availableParallelism();
	const tied = own < cpus().length;
	return tied ? own : Math.max(1, Math.floor(own / localWorld));
}

/** Checks that as many ranks run as the options say. */
export function checkRanks({ world }: Ranks, dpSize: number): void {
	if (dpSize === world) return;
	const found = world === 1 ? "this process trains alone" : `${world} ranks were started`;
	throw new ArlError(
		"ARL_CONFIG",
		`dp_size is ${dpSize}, and ${found}`,
		`Start ${dpSize} ranks, for example with mpirun -n ${dpSize} npx arl train, or leave dp_size out.`,
	);
}

/** Checks that several ranks train on what is built for them. */
export function checkDevice({ world }: Pick<Ranks, "world">, device: string): void {
	if (world === 1 || device === "cpu") return;
	throw new ArlError(
		"ARL_DEVICE",
		`${world} ranks on GPUs (device ${device}): training on several GPUs is not built yet`,
		"Train on one GPU, or with --device cpu on all ranks.",
	);
}
