/** Ranks under srun on one machine, where Slurm is installed: their bits, and one that is killed. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Mpirun } from "../src/launch/mpi.js";
import { eightSteps, errorsOf, LIMIT, type Options } from "./support/eight-steps.js";
import { temporaryFolder } from "./support/folder.js";
import { ended, libraryOf, mpiruns, pidsOf } from "./support/ranks.js";
import { arl, differingFiles, flags, root } from "./support/real.js";
import { hasSlurm, type Slurm, startSlurm } from "./support/slurm.js";

const mpich = mpiruns().find(({ kind }) => kind === "MPICH");
const isThere = mpich !== undefined && hasSlurm("ranks under srun");
const folder = temporaryFolder();
const { common } = eightSteps(folder, { zero: 0 });

describe.skipIf(!isThere)("under srun", () => {
	let slurm: Slurm;

	/** MPICH 5.0.2 under Slurm 22.05 sometimes ends in its own `MPI_Init`; such a run has done nothing yet, and is made again. */
	const srun = async (words: string[], options: Options, out: string, during?: () => void) => {
		const command = [process.execPath, join(root, "dist", "cli", "main.js"), "train"];
		const env = { ...slurm.env, ARL_MPI: String(libraryOf(mpich as Mpirun)) };
		const all = flags({ ...common, ...options, output_dir: out });
		const args = ["-n", "2", "--overcommit", ...words, ...command, ...all];
		for (let tries = 1; ; tries++) {
			const run = await ended(slurm.srun, args, env, during);
			if (tries === 8 || !run.stderr.includes("Fatal error in internal_Init_thread")) return run;
		}
	};

	beforeAll(async () => {
		slurm = await startSlurm(folder);
	}, LIMIT);

	afterAll(() => slurm.stop());

	it("two ranks have the bits of one", { timeout: LIMIT }, async () => {
		const [one, two] = [join(folder, "one"), join(folder, "two")];
		const alone = { ...common, full_determinism: true, gradient_accumulation_steps: 4, output_dir: one };
		const reference = await arl(["train", ...flags(alone)]);
		expect(reference.code, reference.stderr).toBe(0);
		const run = await srun(["--mpi=pmi2"], { gradient_accumulation_steps: 2 }, two);
		expect(run.code, run.stderr).toBe(0);
		expect(run.stderr).toMatch(/rank 0 of 2, 0 of 2 on this host; .*libmpi/);
		expect(differingFiles(join(two, "checkpoint-8"), join(one, "checkpoint-8"))).toEqual([]);
	});

	it("without MPI's interface the error names the words that it takes", { timeout: LIMIT }, async () => {
		const run = await srun(["--mpi=none"], { gradient_accumulation_steps: 2 }, join(folder, "none"));
		expect(run.code, run.stderr).toBe(1);
		expect(run.stderr).toContain("2 ranks were started by srun, which offers no MPI");
		expect(run.stderr).toContain("`srun --mpi=pmi2` (MPICH)");
	});

	it("a rank that is killed ends all, with one error and its code", { timeout: LIMIT }, async () => {
		const out = join(folder, "killed");
		let struck = 0;
		const endless = { gradient_accumulation_steps: 2, max_steps: 1_000_000, save_strategy: "no" };
		const run = await srun(["--mpi=pmi2", "--kill-on-bad-exit=1"], endless, out, () => {
			if (struck > 0 || !existsSync(join(out, "metrics.jsonl"))) return;
			const pid = pidsOf(out).at(-1);
			if (pid === undefined) return;
			struck = Date.now();
			process.kill(pid, "SIGKILL");
		});
		expect(struck, run.stderr).toBeGreaterThan(0);
		expect(Date.now() - struck).toBeLessThan(15_000);
		expect([1, 137, 143], run.stderr).toContain(run.code);
		expect(errorsOf(run).length, run.stderr).toBeLessThanOrEqual(1);
		expect(run.stderr).toMatch(/rank \d( \(host \S+, pid \d+\))? was killed|Killed/);
		expect(pidsOf(out)).toEqual([]);
	});
});
