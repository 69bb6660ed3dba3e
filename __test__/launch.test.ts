/** The launch table: what each launcher's environment says, and what is wrong with it. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { parse } from "yaml";
import { type ArlError, toArlError } from "../src/errors.js";
import { addressText, launchOf, launchText } from "../src/launch/launch.js";
import { findMpirun, mpiLibraries, mpirunArguments } from "../src/launch/mpi.js";
import { expandNodes, firstNode, tasksOfNode } from "../src/launch/slurm.js";
import { root } from "./support/real.js";

/** What a call throws. */
function problem(call: () => unknown): ArlError {
	try {
		call();
	} catch (error) {
		return toArlError(error);
	}
	throw new Error("nothing was thrown");
}

const TORCHRUN = {
	TORCHELASTIC_RUN_ID: "job7",
	TORCHELASTIC_RESTART_COUNT: "0",
	RANK: "5",
	WORLD_SIZE: "8",
	LOCAL_RANK: "1",
	LOCAL_WORLD_SIZE: "4",
	GROUP_RANK: "1",
	MASTER_ADDR: "node0",
	MASTER_PORT: "29500",
};

describe("a row of the launch table", () => {
	it("nothing: one rank", () => {
		expect(launchOf({})).toEqual({
			launcher: "none",
			rank: 0,
			world: 1,
			localRank: 0,
			localWorld: 1,
			nodeRank: 0,
			restart: 0,
			store: { kind: "none" },
		});
		expect(launchOf({ RANK: "0", WORLD_SIZE: "1" }).world).toBe(1);
		expect(launchOf({ WORLD_SIZE: "8" }).world).toBe(1);
	});

	it("torchrun: its store, with keys of this restart alone", () => {
		const found = launchOf(TORCHRUN);
		expect(found).toMatchObject({ launcher: "torchrun", rank: 5, world: 8, localRank: 1, localWorld: 4, nodeRank: 1 });
		expect(found.store).toEqual({ kind: "torchrun", host: "node0", port: 29500, prefix: "arl/job7/0/" });
		const again = launchOf({ ...TORCHRUN, TORCHELASTIC_RESTART_COUNT: "1" });
		expect(again).toMatchObject({ restart: 1, store: { prefix: "arl/job7/1/" } });
		expect(launchText(again)).toBe("torchrun: rank 5 of 8, 1 of 4 on this host, store at node0:29500, restart 1");
	});

	it("IPv6, with and without brackets", () => {
		for (const MASTER_ADDR of ["fd00::7", "[fd00::7]"]) {
			expect(launchOf({ ...TORCHRUN, MASTER_ADDR }).store).toMatchObject({ host: "fd00::7", port: 29500 });
		}
		expect(addressText("fd00::7", 29500)).toBe("[fd00::7]:29500");
	});

	it("Open MPI, also where torchrun's names are left over in the shell", () => {
		const env = {
			OMPI_COMM_WORLD_RANK: "3",
			OMPI_COMM_WORLD_SIZE: "4",
			OMPI_COMM_WORLD_LOCAL_RANK: "1",
			OMPI_COMM_WORLD_LOCAL_SIZE: "2",
		};
		const expected = { launcher: "Open MPI", rank: 3, world: 4, localRank: 1, localWorld: 2, store: { kind: "mpi" } };
		expect(launchOf(env)).toMatchObject(expected);
		expect(launchOf({ ...env, RANK: "0", WORLD_SIZE: "9" })).toMatchObject(expected);
	});

	it("MPICH, Intel MPI and MVAPICH", () => {
		const env = { PMI_RANK: "2", PMI_SIZE: "4", MPI_LOCALRANKID: "0", MPI_LOCALNRANKS: "2" };
		const expected = { launcher: "MPICH", rank: 2, world: 4, localRank: 0, localWorld: 2, store: { kind: "mpi" } };
		expect(launchOf(env)).toMatchObject(expected);
	});

	it("MPICH under srun --mpi=pmi2: ranks of PMI, places of Slurm", () => {
		const env = {
			PMI_RANK: "3",
			PMI_SIZE: "4",
			PMI_FD: "9",
			SLURM_LOCALID: "1",
			SLURM_NODEID: "1",
			SLURM_STEP_TASKS_PER_NODE: "2(x2)",
		};
		expect(launchOf(env)).toMatchObject({ launcher: "MPICH", rank: 3, localRank: 1, localWorld: 2, nodeRank: 1 });
	});

	const SLURM = {
		SLURM_STEP_ID: "0",
		SLURM_JOB_ID: "123456",
		SLURM_PROCID: "4",
		SLURM_NTASKS: "5",
		SLURM_LOCALID: "0",
		SLURM_NODEID: "2",
		SLURM_STEP_TASKS_PER_NODE: "2(x2),1",
		SLURM_STEP_NODELIST: "n[01-03,7],m2",
	};

	it("srun with MPI's interface", () => {
		const expected = { launcher: "srun", rank: 4, world: 5, localRank: 0, localWorld: 1, nodeRank: 2 };
		expect(launchOf({ ...SLURM, PMIX_RANK: "4" })).toMatchObject({ ...expected, store: { kind: "mpi" } });
		expect(launchOf({ ...SLURM, PMI_FD: "7" }).store).toEqual({ kind: "mpi" });
	});

	it("srun without it: the first node, and a port of the job", () => {
		expect(launchOf(SLURM).store).toEqual({ kind: "tcp", host: "n01", port: 20_000 + (123_456 % 20_000) });
		expect(launchOf({ ...SLURM, MASTER_PORT: "4711" }).store).toMatchObject({ port: 4711 });
		expect(launchOf({ ...SLURM, SLURM_RESTART_COUNT: "2" }).restart).toBe(2);
	});

	it("srun's own step counts, not the job", () => {
		expect(launchOf({ ...SLURM, SLURM_NTASKS: "64", SLURM_STEP_NUM_TASKS: "5" }).world).toBe(5);
		// A batch script is no step.
		expect(launchOf({ SLURM_JOB_ID: "1", SLURM_PROCID: "0", SLURM_NTASKS: "8" }).world).toBe(1);
	});

	const PLAIN = { RANK: "1", WORLD_SIZE: "2", MASTER_ADDR: "a", MASTER_PORT: "29500" };

	it("ranks that a job controller numbers", () => {
		expect(launchOf(PLAIN)).toMatchObject({
			launcher: "environment",
			rank: 1,
			world: 2,
			localRank: 0,
			store: { kind: "tcp", host: "a", port: 29500 },
		});
		expect(launchOf({ ...PLAIN, LOCAL_RANK: "1" })).toMatchObject({ localRank: 1, localWorld: 2 });
	});

	it("numbers of pods under Kubernetes are refused where a pod sees several GPUs", () => {
		const pod = { ...PLAIN, KUBERNETES_SERVICE_HOST: "10.0.0.1" };
		expect(launchOf(pod, 1).rank).toBe(1);
		expect(launchOf({ ...pod, LOCAL_RANK: "0" }, 8).rank).toBe(1);
		expect(problem(() => launchOf(pod, 8))).toMatchObject({
			code: "ARL_DEVICE",
			message: expect.stringContaining("this pod sees 8 GPUs: RANK may number pods"),
		});
	});
});

describe("an environment that is wrong", () => {
	it.each([
		[{ RANK: "1", WORLD_SIZE: "2" }, "MASTER_ADDR and MASTER_PORT is not set"],
		[{ ...TORCHRUN, RANK: "x" }, 'RANK of torchrun is "x", which is no number'],
		[{ OMPI_COMM_WORLD_SIZE: "2" }, "OMPI_COMM_WORLD_RANK of Open MPI is not set"],
		[{ PMI_SIZE: "2", PMI_RANK: "-1" }, 'PMI_RANK of MPICH is "-1", which is no number'],
		[{ PMI_SIZE: "2", PMI_RANK: "2" }, "the environment of MPICH contradicts itself: rank 2 of 2"],
		[{ ...TORCHRUN, LOCAL_WORLD_SIZE: "9" }, "contradicts itself: rank 5 of 8, local rank 1 of 9"],
	])("%j", (env, message) => {
		expect(problem(() => launchOf(env as Record<string, string>))).toMatchObject({
			code: "ARL_DEVICE",
			message: expect.stringContaining(message),
		});
	});
});

describe("Slurm's short forms", () => {
	it("expand to the names that they stand for", () => {
		expect(expandNodes("n[01-03,7],m2")).toEqual(["n01", "n02", "n03", "n7", "m2"]);
		expect(expandNodes("host")).toEqual(["host"]);
		expect(expandNodes("rack[1-2]-n[08-10]")).toEqual(
			["rack1-n08", "rack1-n09", "rack1-n10"].concat(["rack2-n08", "rack2-n09", "rack2-n10"]),
		);
		expect(firstNode("gpu[17,3]")).toBe("gpu17");
		for (const bad of ["n[1-", "n[3-1]", "n[a]", "", "n]"]) {
			expect(problem(() => expandNodes(bad)).message).toContain("cannot be read");
		}
	});

	it("count the tasks of a node", () => {
		expect([0, 1, 2].map((node) => tasksOfNode("2(x2),1", node))).toEqual([2, 2, 1]);
		expect(tasksOfNode("8", 0)).toBe(8);
		expect(problem(() => tasksOfNode("8", 1)).message).toContain("without node 1");
		expect(problem(() => tasksOfNode("many", 0)).message).toContain("without node 0");
	});
});

describe("the library that belongs to a launcher", () => {
	const programs = ["/bin/sh", "/opt/mpi/bin/prterun"];
	const exists = (path: string) => path.startsWith("/opt/mpi/lib/");

	it("is next to the launcher's program, else the loader's", () => {
		expect(mpiLibraries("Open MPI", {}, programs, (path) => path === "/opt/mpi/lib/libmpi.so.40")).toEqual([
			"/opt/mpi/lib/libmpi.so.40",
			"libmpi.so.40",
			"libmpi_abi.so.1",
			"libmpi.so.12",
		]);
		expect(mpiLibraries("MPICH", {}, programs, exists)[0]).toBe("/opt/mpi/lib/libmpi_abi.so.1");
		expect(mpiLibraries("MPICH", {}, [], exists)).toEqual(["libmpi_abi.so.1", "libmpi.so.12", "libmpi.so.40"]);
		expect(mpiLibraries("srun", { PMIX_RANK: "0" }, [], exists)[0]).toBe("libmpi.so.40");
		expect(mpiLibraries("srun", { PMI_FD: "4" }, [], exists)[0]).toBe("libmpi_abi.so.1");
	});

	it("is the one that ARL_MPI names, and no other", () => {
		expect(mpiLibraries("MPICH", { ARL_MPI: "/my/libmpi.so" }, programs, exists)).toEqual(["/my/libmpi.so"]);
	});
});

describe("mpirun", () => {
	it("gets arguments against tying, counting and refusing ranks where it is Open MPI's", () => {
		expect(mpirunArguments({ kind: "Open MPI" }, 2, true)).toEqual(
			["-n", "2", "--bind-to", "none"].concat("--oversubscribe", "--allow-run-as-root"),
		);
		expect(mpirunArguments({ kind: "Open MPI" }, 2, false)).not.toContain("--allow-run-as-root");
		expect(mpirunArguments({ kind: "MPICH" }, 4, true)).toEqual(["-n", "4"]);
	});

	it("is not found where there is none", () => {
		expect(findMpirun("/nowhere:")).toBeNull();
		expect(findMpirun(undefined)).toBeNull();
	});
});

describe("the manifests of docs/distributed.md", () => {
	const text = readFileSync(join(root, "docs", "distributed.md"), "utf8");
	const manifests = [...text.matchAll(/```yaml\n(apiVersion[^`]*)```/g)].map(([, yaml]) => parse(String(yaml)));
	const of = (kind: string) => manifests.find((manifest) => manifest.kind === kind).spec;
	const ranksOf = (environments: Record<string, string>[]) => {
		const found = environments.map((env) => launchOf({ KUBERNETES_SERVICE_HOST: "10.0.0.1", ...env }, 8));
		expect(found.map(({ rank }) => rank)).toEqual(environments.map((_, i) => i));
		expect(new Set(found.map(({ world }) => world))).toEqual(new Set([environments.length]));
		return found;
	};

	it("give each pod of a JobSet its rank", () => {
		const { parallelism, completions, template } = of("JobSet").replicatedJobs[0].template.spec;
		expect(parallelism).toBe(completions);
		const { env } = template.spec.containers[0];
		const values = (index: number) =>
			env.map(({ name, value, valueFrom }: { name: string; value?: string; valueFrom?: unknown }) => {
				if (value === undefined) expect(JSON.stringify(valueFrom)).toContain("job-completion-index");
				return [name, value ?? String(index)];
			});
		const pods = Array.from({ length: completions }, (_, index) => Object.fromEntries(values(index)));
		for (const { store, localRank, localWorld } of ranksOf(pods)) {
			expect(store).toEqual({ kind: "tcp", host: "arl-rank-0-0.arl", port: 29500 });
			expect([localRank, localWorld]).toEqual([0, 1]);
		}
	});

	it("have torchrun start as many ranks as a TrainJob has GPUs", () => {
		const { numNodes, numProcPerNode, command, resourcesPerNode } = of("TrainJob").trainer;
		expect(command.slice(0, 2)).toEqual(["torchrun", "--no-python"]);
		expect(resourcesPerNode.limits["nvidia.com/gpu"]).toBe(numProcPerNode);
		const world = numNodes * numProcPerNode;
		const ranks = Array.from({ length: world }, (_, rank) => ({
			...TORCHRUN,
			RANK: String(rank),
			WORLD_SIZE: String(world),
			LOCAL_RANK: String(rank % numProcPerNode),
			LOCAL_WORLD_SIZE: String(numProcPerNode),
		}));
		for (const { store } of ranksOf(ranks)) expect(store.kind).toBe("torchrun");
	});

	it("give each actor of Ray its rank", () => {
		const world = Number(/ranks\.py (\d+)/.exec(of("RayJob").entrypoint)?.[1]);
		expect(of("RayJob").rayClusterSpec.workerGroupSpecs[0].replicas).toBe(world);
		const names = [...(/place = \{([^}]*)\}/.exec(text)?.[1] ?? "").matchAll(/"([A-Z_]+)": /g)].map(([, name]) => name);
		const values = { WORLD_SIZE: String(world), LOCAL_RANK: "0", MASTER_ADDR: "a", MASTER_PORT: "4711" };
		const actors = Array.from({ length: world }, (_, rank) => ({ RANK: String(rank), ...values }));
		expect(names.sort()).toEqual(Object.keys(actors[0] as object).sort());
		for (const { launcher } of ranksOf(actors)) expect(launcher).toBe("environment");
	});
});
