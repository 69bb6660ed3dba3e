/**
 * Opens the ranks of this process's launcher: MPI first, through which all learn where rank 0 listens, then a connection from
 * each to rank 0. Before that, nothing can tell a rank that another one has failed, so it may not take long.
 */
import { fstatSync } from "node:fs";
import { networkInterfaces } from "node:os";
import { ArlError } from "../errors.js";
import { type Launch, launchText } from "../launch/launch.js";
import { INSTALL_MPI, mpiLibraries } from "../launch/mpi.js";
import type { Native } from "../native.js";
import { Hub } from "./hub.js";
import { type Centre, Worker } from "./worker.js";

/** What every rank has of the address: as JSON, filled up. */
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
 * Opens the ranks. Ends the process where the others do not come.
 *
 * @throws ArlError `ARL_DEVICE` where the launcher has no MPI, or another one than the library's.
 */
export async function openRanks(launch: Launch, native: Native): Promise<OpenedRanks> {
	const { rank, world } = launch;
	if (launch.store.kind !== "mpi") throw withoutMpi(launch);
	checkInherited(launch.launcher, process.env.PMI_FD);
	const late = setTimeout(() => {
		const seconds = OPEN_MILLISECONDS / 1000;
		process.stderr.write(`ARL_DEVICE rank ${rank}: not all of ${world} ranks have started within ${seconds} s\n`);
		process.exit(1);
	}, OPEN_MILLISECONDS);
	try {
		return await connected(launch, native);
	} finally {
		clearTimeout(late);
	}
}

async function connected(launch: Launch, native: Native): Promise<OpenedRanks> {
	const { launcher, rank, world, localWorld } = launch;
	for (const [name, value] of Object.entries(NO_HOOKS)) process.env[name] ??= value;
	const mpi = await native.Ranks.open(mpiLibraries(launcher, process.env), rank, world, launcher);
	const hub = rank === 0 ? await Hub.listen(world, localWorld, mpi) : null;
	const received = await mpi.broadcast(
		hub === null ? new Uint8Array(ADDRESS_BYTES) : packed({ hosts: addresses(), ...hub.address }),
	);
	const centre = JSON.parse(Buffer.from(received).toString().trim()) as Centre;
	const ranks = hub ?? (await Worker.connect(centre, rank, localWorld, native, mpi));
	if (ranks instanceof Hub) await ranks.connected();
	const hosts = ranks instanceof Hub ? `; hosts: ${ranks.hosts.join(", ")}` : "";
	return { ranks, found: `${launchText(launch)}; ${mpi.library()}${hosts}` };
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

function withoutMpi({ launcher, world, store }: Launch): ArlError {
	const here = launcher === "srun" ? "`srun --mpi=pmix` (Open MPI) or `srun --mpi=pmi2` (MPICH)" : "mpirun";
	const why = store.kind === "torchrun" || store.kind === "tcp" ? "offers no MPI" : "is not known";
	return new ArlError(
		"ARL_DEVICE",
		`${world} ranks were started by ${launcher}, which ${why}: ranks on CPUs exchange gradients by MPI, and several GPUs are not built yet`,
		`Start them with ${here}, for example: mpirun -n ${world} npx arl train ... --device cpu. ${INSTALL_MPI}`,
	);
}
