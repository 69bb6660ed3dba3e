/**
 * What started this process, and which of how many ranks it is: a pure function of the environment. The first row of the
 * table that fits is taken. Opens nothing.
 */
import { ArlError } from "../errors.js";
import { firstNode, tasksOfNode } from "./slurm.js";

type Environment = Readonly<Record<string, string | undefined>>;

/** What started the ranks. */
export type Launcher = "torchrun" | "Open MPI" | "MPICH" | "srun" | "environment" | "none";

/** How ranks find each other before they are connected. */
export type Store =
	/** The launcher's MPI. */
	| { kind: "mpi" }
	/** The store that torchrun runs; keys begin with `prefix`. */
	| { kind: "torchrun"; host: string; port: number; prefix: string }
	/** Rank 0 listens there. */
	| { kind: "tcp"; host: string; port: number }
	| { kind: "none" };

/** This process among all ranks. */
export interface Launch {
	launcher: Launcher;
	rank: number;
	world: number;
	/** The number of this rank on its node, and how many there are. */
	localRank: number;
	localWorld: number;
	/** Null: the launcher does not say. */
	nodeRank: number | null;
	/** How often the launcher has restarted the ranks. */
	restart: number;
	store: Store;
}

const ALONE: Launch = {
	launcher: "none",
	rank: 0,
	world: 1,
	localRank: 0,
	localWorld: 1,
	nodeRank: 0,
	restart: 0,
	store: { kind: "none" },
};

/** Which ports a Slurm job uses whose environment names none. */
const SLURM_PORT = 20_000;

/**
 * Reads the environment. `gpus`: how many this process sees.
 *
 * @throws ArlError `ARL_DEVICE` where variables are missing, are no numbers, or contradict each other.
 */
export function launchOf(env: Environment, gpus = 0): Launch {
	const launch = byLauncher(env) ?? byMaster(env, gpus) ?? ALONE;
	const { launcher, rank, world, localRank, localWorld } = launch;
	if (rank >= world || localRank >= localWorld || localWorld > world) {
		const found = `rank ${rank} of ${world}, local rank ${localRank} of ${localWorld}`;
		throw new ArlError(
			"ARL_DEVICE",
			`the environment of ${launcher} contradicts itself: ${found}`,
			"Start all ranks with one launcher, and set none of its variables by hand.",
		);
	}
	return launch;
}

function byLauncher(env: Environment): Launch | null {
	if (env.TORCHELASTIC_RUN_ID !== undefined) {
		const take = reader(env, "torchrun");
		const restart = take("TORCHELASTIC_RESTART_COUNT", 0);
		return {
			launcher: "torchrun",
			rank: take("RANK"),
			world: take("WORLD_SIZE"),
			localRank: take("LOCAL_RANK"),
			localWorld: take("LOCAL_WORLD_SIZE"),
			nodeRank: take("GROUP_RANK", null),
			restart,
			store: { kind: "torchrun", ...master(env, take), prefix: `arl/${env.TORCHELASTIC_RUN_ID}/${restart}/` },
		};
	}
	if (env.OMPI_COMM_WORLD_SIZE !== undefined) {
		const take = reader(env, "Open MPI");
		return {
			...ofMpi("Open MPI", env),
			rank: take("OMPI_COMM_WORLD_RANK"),
			world: take("OMPI_COMM_WORLD_SIZE"),
			localRank: take("OMPI_COMM_WORLD_LOCAL_RANK"),
			localWorld: take("OMPI_COMM_WORLD_LOCAL_SIZE"),
		};
	}
	if (env.PMI_SIZE !== undefined) {
		const take = reader(env, "MPICH");
		const world = take("PMI_SIZE");
		// Under srun MPICH's own variables about the node are missing, and Slurm's are there.
		const local = env.MPI_LOCALRANKID === undefined && env.SLURM_LOCALID !== undefined ? slurmLocal(env) : null;
		return {
			...ofMpi("MPICH", env),
			rank: take("PMI_RANK"),
			world,
			localRank: local?.localRank ?? take("MPI_LOCALRANKID", 0),
			localWorld: local?.localWorld ?? take("MPI_LOCALNRANKS", 1),
		};
	}
	if (env.SLURM_STEP_ID !== undefined && env.SLURM_PROCID !== undefined) {
		const take = reader(env, "srun");
		const world = take(env.SLURM_STEP_NUM_TASKS === undefined ? "SLURM_NTASKS" : "SLURM_STEP_NUM_TASKS");
		const place = { rank: take("SLURM_PROCID"), world, ...slurmLocal(env) };
		const node = { nodeRank: take("SLURM_NODEID", null), restart: take("SLURM_RESTART_COUNT", 0) };
		return { launcher: "srun", ...place, ...node, store: slurmStore(env) };
	}
	return null;
}

function ofMpi(launcher: Launcher, env: Environment) {
	const nodeRank = env.SLURM_NODEID === undefined ? null : reader(env, launcher)("SLURM_NODEID");
	return { launcher, nodeRank, restart: 0, store: { kind: "mpi" } as const };
}

function slurmLocal(env: Environment) {
	const take = reader(env, "srun");
	const tasks = env.SLURM_STEP_TASKS_PER_NODE ?? env.SLURM_TASKS_PER_NODE;
	return {
		localRank: take("SLURM_LOCALID"),
		localWorld: tasks === undefined ? 1 : tasksOfNode(tasks, take("SLURM_NODEID", 0)),
	};
}

/** MPI, where srun offers one of its interfaces; else a port that is the same for all ranks of the job. */
function slurmStore(env: Environment): Store {
	if (env.PMIX_RANK !== undefined || env.PMI_FD !== undefined) return { kind: "mpi" };
	const take = reader(env, "srun");
	const port = take("MASTER_PORT", SLURM_PORT + (take("SLURM_JOB_ID", 0) % SLURM_PORT));
	const nodes = env.SLURM_STEP_NODELIST ?? env.SLURM_JOB_NODELIST ?? "localhost";
	return { kind: "tcp", host: env.MASTER_ADDR ?? firstNode(nodes), port };
}

const PLAIN = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] as const;

/** Ranks that a job controller or a person numbers: JobSet, Ray, a shell. */
function byMaster(env: Environment, gpus: number): Launch | null {
	if (env.RANK === undefined || env.WORLD_SIZE === undefined) return null;
	const take = reader(env, "environment");
	const world = take("WORLD_SIZE");
	if (world === 1) return null;
	const missing = PLAIN.filter((name) => env[name] === undefined);
	if (missing.length > 0) {
		throw new ArlError(
			"ARL_DEVICE",
			`RANK and WORLD_SIZE name rank ${env.RANK} of ${world}, and ${missing.join(" and ")} is not set`,
			"Set all four of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE to train alone.",
		);
	}
	if (env.LOCAL_RANK === undefined && env.KUBERNETES_SERVICE_HOST !== undefined && gpus > 1) {
		throw new ArlError(
			"ARL_DEVICE",
			`RANK ${env.RANK} of ${world} is set without LOCAL_RANK, and this pod sees ${gpus} GPUs: RANK may number pods, not processes`,
			"Start torchrun in each pod with --nproc_per_node, or set RANK, LOCAL_RANK and WORLD_SIZE for one process a GPU.",
		);
	}
	return {
		launcher: "environment",
		rank: take("RANK"),
		world,
		localRank: take("LOCAL_RANK", 0),
		localWorld: take("LOCAL_WORLD_SIZE", take("LOCAL_RANK", 0) + 1),
		nodeRank: take("GROUP_RANK", take("NODE_RANK", null)),
		restart: 0,
		store: { kind: "tcp", ...master(env, take) },
	};
}

interface Reader {
	(name: string): number;
	<T extends number | null>(name: string, absent: T): number | T;
}

/** Reads whole numbers of the environment. */
function reader(env: Environment, launcher: Launcher): Reader {
	return (name: string, absent?: number | null) => {
		const text = env[name];
		if (text === undefined && absent !== undefined) return absent as number;
		if (text !== undefined && /^\d{1,9}$/.test(text.trim())) return Number(text);
		const found = text === undefined ? "not set" : `${JSON.stringify(text)}, which is no number`;
		throw new ArlError(
			"ARL_DEVICE",
			`${name} of ${launcher} is ${found}`,
			"Start all ranks with one launcher, and set none of its variables by hand.",
		);
	};
}

function master(env: Environment, take: Reader): { host: string; port: number } {
	// An IPv6 address may be written in brackets.
	const host = (env.MASTER_ADDR ?? "127.0.0.1").replace(/^\[(.*)\]$/, "$1");
	return { host, port: take("MASTER_PORT") };
}

/** An address as people write it: IPv6 in brackets. */
export function addressText(host: string, port: number): string {
	return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/** What was found, for the user. */
export function launchText({ launcher, rank, world, localRank, localWorld, restart, store }: Launch): string {
	const where = "host" in store ? `, store at ${addressText(store.host, store.port)}` : "";
	const again = restart > 0 ? `, restart ${restart}` : "";
	return `${launcher}: rank ${rank} of ${world}, ${localRank} of ${localWorld} on this host${where}${again}`;
}
