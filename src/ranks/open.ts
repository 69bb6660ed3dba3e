/**
 * Opens the ranks of this process's launcher: all learn where rank 0 listens, through MPI, torchrun's store or a port that they
 * know, and each connects to it. Before that, nothing can tell a rank that another one has failed, so it may not take long.
 */
import { fstatSync } from "node:fs";
import { networkInterfaces } from "node:os";
import { ArlError } from "../errors.js";
import { type Launch, launchText, type Store } from "../launch/launch.js";
import { obtain, type Published, publish } from "../launch/meeting.js";
import { INSTALL_MPI, mpiLibraries } from "../launch/mpi.js";
import type { Native, NativeRanks } from "../native.js";
import { Hub } from "./hub.js";
import { type Centre, Worker } from "./worker.js";

/** What every rank has of the address, where it goes through MPI: as JSON, filled up. */
const ADDRESS_BYTES = 8192;
/** MPI waits for all ranks for ever; one that has ended before it came so far would hold up the others. */
const OPEN_MILLISECONDS = 60_000;

/**
 * Open MPI and UCX learn of freed memory by patching `brk` and `munmap` in the running process. Node's threads allocate meanwhile,
 * and a heap whose end was cut off so has crashed Node's garbage collector. What users set themselves stays.
 */
export const NO_HOOKS = {
	OMPI_MCA_memory: "^patcher",
	UCX_MEM_EVENTS: "n",
	UCX_MEM_MALLOC_HOOKS: "n",
	UCX_MEM_MMAP_HOOK_MODE: "none",
};

/** The ranks, seen from this one, and what was found, in words. */
export interface OpenedRanks {
	ranks: Hub | Worker;
	found: string;
}

/**
 * Opens the ranks. Ends the process where the others do not come. `cpu`: they are known to compute on CPUs.
 *
 * @throws ArlError `ARL_DEVICE` where the launcher has another MPI than the library's, its store does not answer, or ranks on
 * CPUs have no MPI.
 */
export async function openRanks(launch: Launch, native: Native, cpu = false): Promise<OpenedRanks> {
	const { rank, world, store } = launch;
	if (store.kind === "none" || (store.kind !== "mpi" && cpu)) throw withoutMpi(launch);
	if (store.kind === "mpi") checkInherited(launch.launcher, process.env.PMI_FD);
	const late = setTimeout(() => {
		const seconds = OPEN_MILLISECONDS / 1000;
		process.stderr.write(`ARL_DEVICE rank ${rank}: not all of ${world} ranks have started within ${seconds} s\n`);
		process.exit(1);
	}, OPEN_MILLISECONDS);
	try {
		const opened = store.kind === "mpi" ? overMpi(launch, native) : overStore(launch, store, native);
		return await opened;
	} finally {
		clearTimeout(late);
	}
}

async function overMpi(launch: Launch, native: Native): Promise<OpenedRanks> {
	const { launcher, rank, world, localWorld } = launch;
	for (const [name, value] of Object.entries(NO_HOOKS)) process.env[name] ??= value;
	const mpi = await native.Ranks.open(mpiLibraries(launcher, process.env), rank, world, launcher);
	const hub = rank === 0 ? await Hub.listen(world, localWorld, mpi) : null;
	const received = await mpi.broadcast(hub === null ? new Uint8Array(ADDRESS_BYTES) : packed(centreOf(hub)));
	return connected(launch, native, hub, Buffer.from(received).toString(), mpi);
}

async function overStore(
	launch: Launch,
	store: Extract<Store, { kind: "torchrun" | "tcp" }>,
	native: Native,
): Promise<OpenedRanks> {
	const { rank, world, localWorld } = launch;
	const hub = rank === 0 ? await Hub.listen(world, localWorld, null, withoutMpi(launch)) : null;
	let published: Published | null = null;
	try {
		const centre = hub === null ? await obtain(store, OPEN_MILLISECONDS) : JSON.stringify(centreOf(hub));
		if (hub !== null) published = await publish(store, centre, OPEN_MILLISECONDS);
		return await connected(launch, native, hub, centre, null);
	} finally {
		published?.close();
	}
}

async function connected(
	launch: Launch,
	native: Native,
	hub: Hub | null,
	centre: string,
	mpi: NativeRanks | null,
): Promise<OpenedRanks> {
	const { rank, localWorld } = launch;
	const ranks = hub ?? (await Worker.connect(JSON.parse(centre.trim()) as Centre, rank, localWorld, native, mpi));
	if (ranks instanceof Hub) await ranks.connected();
	const hosts = ranks instanceof Hub ? `; hosts: ${ranks.hosts.join(", ")}` : "";
	const library = mpi === null ? "" : `; ${mpi.library()}`;
	return { ranks, found: `${launchText(launch)}${library}${hosts}` };
}

function centreOf(hub: Hub): Centre {
	return { hosts: addresses(), ...hub.address };
}

function packed(centre: Centre): Uint8Array {
	const bytes = new Uint8Array(ADDRESS_BYTES).fill(0x20);
	bytes.set(Buffer.from(JSON.stringify(centre)));
	return bytes;
}

/** This host's addresses, for ranks on other hosts, and last the one that only this host knows. */
function addresses(): string[] {
	const all = Object.values(networkInterfaces()).flatMap((found) => found ?? []);
	const outer = all
		.filter(({ internal, address }) => !internal && !address.startsWith("fe80"))
		.map(({ address }) => address);
	return [...outer.slice(0, 64), "127.0.0.1"];
}

/** MPICH's launcher gives each rank an open connection, which programs between the two have to pass on. */
function checkInherited(launcher: string, descriptor: string | undefined): void {
	if (descriptor === undefined) return;
	try {
		if (fstatSync(Number(descriptor)).isSocket()) return;
	} catch {
		// It is closed.
	}
	throw new ArlError(
		"ARL_DEVICE",
		`${launcher} has opened a connection for this rank (PMI_FD ${descriptor}), which a program between them has closed, as npx does`,
		"Start arl itself on the ranks: mpirun -n 2 node_modules/.bin/arl train ...; or leave mpirun to it, with --nproc_per_node.",
	);
}

function withoutMpi({ launcher, world }: Launch): ArlError {
	const here = launcher === "srun" ? "`srun --mpi=pmix` (Open MPI) or `srun --mpi=pmi2` (MPICH)" : "mpirun";
	return new ArlError(
		"ARL_DEVICE",
		`${world} ranks were started by ${launcher}, which offers no MPI: ranks on CPUs exchange gradients by MPI`,
		`Start them with ${here}, for example: mpirun -n ${world} npx arl train ... --device cpu. ${INSTALL_MPI}`,
	);
}
