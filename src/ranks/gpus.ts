/**
 * The GPUs of ranks: which one is whose, and what they need to exchange buffers. An addon of its own has the engine on a GPU, so
 * that its connections are its own, too: over TCP for figures, NCCL for the rest.
 */
import { randomBytes } from "node:crypto";
import { hostname } from "node:os";
import { ArlError } from "../errors.js";
import type { Native, NativeRanks } from "../native.js";

/** How ranks find each other's GPUs; sent to all, as JSON. */
export interface GpuMeeting {
	port: number;
	token: string;
	/** Of NCCL's communicator, in base64. */
	id: string;
}

/** A rank's GPU. */
export interface RankGpu {
	host: string;
	/** As the option `device` names it there. */
	device: string;
	name: string;
	/** What tells it from all others; empty: unknown. */
	uuid: string;
}

/** How long the others have to connect, once each has loaded its addon. */
const CONNECT_SECONDS = 60;

/** Set to 1 where two ranks may share a GPU, as NCCL 2.30 and newer allow. */
const SHARED = "NCCL_MULTI_RANK_GPU_ENABLE";

/** Waits for the other ranks, as rank 0. `accept` resolves when all are connected. */
export function meetGpus(native: Native, world: number): { meeting: GpuMeeting; accept: () => Promise<NativeRanks> } {
	const token = randomBytes(32).toString("hex");
	const id = Buffer.from(native.ncclId()).toString("base64");
	const listener = native.RankListener.open(world, token);
	return { meeting: { port: listener.port(), token, id }, accept: () => listener.accept(CONNECT_SECONDS) };
}

/** Connects to rank 0, which is on one of `hosts`. */
export function connectGpus(
	native: Native,
	hosts: readonly string[],
	{ port, token }: GpuMeeting,
	rank: number,
	world: number,
): Promise<NativeRanks> {
	return native.Ranks.connect([...hosts], port, token, rank, world);
}

/** The id in a meeting. */
export function idOf({ id }: GpuMeeting): Uint8Array {
	return Buffer.from(id, "base64");
}

/** This rank's GPU. `native`: the addon of its engine. */
export function gpuOf(native: Native, device: string): RankGpu {
	const found = native.cudaReport([]).devices.find((gpu) => gpu.device === device);
	return { host: hostname(), device, name: found?.name ?? "unknown", uuid: found?.uuid ?? "" };
}

/**
 * The GPU of rank `localRank` of `localWorld` on this host, as the option `device` names it. `wanted`: that option; `usable`: the
 * GPUs that this process sees and can use.
 *
 * @throws ArlError `ARL_DEVICE` where there are too few, `ARL_CONFIG` where all ranks would take one.
 */
export function deviceOfRank(
	wanted: string,
	usable: readonly string[],
	{ localRank, localWorld }: { localRank: number; localWorld: number },
	env: Readonly<Record<string, string | undefined>> = process.env,
): string {
	if (/^cuda:\d+$/.test(wanted) && localWorld > 1) {
		throw new ArlError(
			"ARL_CONFIG",
			`device ${wanted} names one GPU, and ${localWorld} ranks run on this host`,
			"Use --device cuda: each rank takes the GPU with its own number on the host.",
		);
	}
	if (localWorld === 1 || env[SHARED] === "1") {
		const number = usable.length === 0 ? 0 : localRank % usable.length;
		return /^cuda:\d+$/.test(wanted) ? wanted : (usable[number] ?? wanted);
	}
	// Where each rank was given a GPU of its own, each sees one; whether they are one and the same is found out later.
	if (usable.length === 1) return usable[0] as string;
	const found = usable[localRank];
	if (found !== undefined) return found;
	throw new ArlError(
		"ARL_DEVICE",
		`rank ${localRank} of ${localWorld} on this host has no GPU: ${usable.length} can be used (${usable.join(", ")})`,
		`Start as many ranks a host as it has GPUs; several on one GPU need ${SHARED}=1 and NCCL 2.30 or newer.`,
	);
}

/**
 * Checks that no two ranks use one GPU. `gpus`: by rank; `name`: of a rank.
 *
 * @throws ArlError `ARL_DEVICE` naming both.
 */
export function checkShared(
	gpus: readonly RankGpu[],
	name: (rank: number) => string,
	env: Readonly<Record<string, string | undefined>> = process.env,
): void {
	if (env[SHARED] === "1") return;
	const first = new Map<string, number>();
	for (const [rank, { device, name: gpu, uuid }] of gpus.entries()) {
		const other = first.get(uuid);
		if (uuid === "") continue;
		if (other === undefined) {
			first.set(uuid, rank);
			continue;
		}
		throw new ArlError(
			"ARL_DEVICE",
			`${name(other)} and ${name(rank)} use one GPU: ${device} (${gpu})`,
			`Start as many ranks a host as it has GPUs, each seeing all of them or one of its own; ${SHARED}=1 allows it from NCCL 2.30 on.`,
		);
	}
}
