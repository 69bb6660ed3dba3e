/** Ranks that are killed before they have met, that cannot write, that get no memory, and that are asked to stop at any moment: on the real core. */
import { spawnSync } from "node:child_process";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { totalmem } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { Mpirun } from "../src/launch/mpi.js";
import { eightSteps, errorsOf, LIMIT } from "./support/eight-steps.js";
import { temporaryFolder } from "./support/folder.js";
import { arlOnRanks, mpiruns, pidsOf, rankOf } from "./support/ranks.js";
import { arl, differingFiles, type Ended, root, tinyPlace } from "./support/real.js";
import { SmallDisk } from "./support/small-disk.js";

const found = mpiruns();
const first = found[0] as Mpirun;
const folder = temporaryFolder();
/** Each step is saved. */
const { train } = eightSteps(folder, { save_steps: 1, save_total_limit: 3 });

/** Two ranks that divide moments, so that both write a part of each checkpoint. */
const TWO = { gradient_accumulation_steps: 2, zero: 2 };
/** A run long enough for something to happen in it. */
const ENDLESS = { ...TWO, max_steps: 1_000_000, lr_scheduler_type: "constant" };

/** Two ranks that plan 3.3 GiB each, and use next to none of it. */
const isSmall = totalmem() < 12 * 2 ** 30;
if (isSmall) process.stderr.write("SKIPPED: a rank that gets no memory: this machine has less than 12 GiB\n");

const names = (out: string) => (existsSync(out) ? readdirSync(out) : []);
const partialOf = (out: string) => names(out).find((name) => name.endsWith(".partial"));
const lastSaved = (out: string) =>
	Math.max(0, ...names(out).map((name) => Number(/^checkpoint-(\d+)$/.exec(name)?.[1] ?? 0)));

/** Runs two ranks, and does something once, at the first moment that `when` sees. */
async function at(args: string[], when: () => boolean, act: () => boolean): Promise<Ended> {
	let done = false;
	const timer = setInterval(() => {
		if (!done && when()) done = act();
	}, 1);
	const run = await arlOnRanks(first, 2, args).finally(() => clearInterval(timer));
	expect(done, run.stderr).toBe(true);
	return run;
}

/** A module after whose import the core's step of this number ends as one whose computation has panicked. */
function panicking(step: number): string {
	const file = join(folder, `panics-in-step-${step}.mjs`);
	const error = { code: "ARL_INTERNAL", message: "the native part failed: out of bounds", hint: "Please report it." };
	const lines = [
		'import { createRequire } from "node:module";',
		`const { Engine } = createRequire(import.meta.url)(${JSON.stringify(join(root, "binding.cjs"))});`,
		"const { submitStep } = Engine.prototype;",
		"let steps = 0;",
		"Engine.prototype.submitStep = function (...values) {",
		`	if (++steps < ${step}) return submitStep.apply(this, values);`,
		`	return Promise.reject(new Error(${JSON.stringify(JSON.stringify(error))}));`,
		"};",
	];
	writeFileSync(file, lines.join("\n"));
	return file;
}

/** Sends a signal to all ranks. */
function signalled(out: string): boolean {
	const pids = pidsOf(out);
	for (const pid of pids) process.kill(pid, "SIGTERM");
	return pids.length > 0;
}

/** Expects that what is there is whole: the next run takes it, and leaves nothing partial. */
async function goesOn(out: string): Promise<void> {
	const saved = lastSaved(out);
	const next = train({ ...ENDLESS, max_steps: saved + 1, resume_from_checkpoint: "latest" }, out);
	const run = await arlOnRanks(first, 2, next.args);
	expect(run.code, run.stderr).toBe(0);
	expect(partialOf(out)).toBeUndefined();
	expect(lastSaved(out)).toBe(saved + 1);
}

describe.skipIf(found.length === 0)("a rank", () => {
	it.each(found)(
		"that is killed before the ranks have met ends all, with its signal's code: $kind",
		{
			timeout: LIMIT,
		},
		async (mpirun) => {
			const { out, args } = train(TWO);
			const started = Date.now();
			const run = await arlOnRanks(mpirun, 2, args, { before: { 1: "kill -9 $$" } });
			expect(run.code, run.stderr).toBe(mpirun.kind === "MPICH" ? 9 : 137);
			expect(Date.now() - started).toBeLessThan(30_000);
			expect(pidsOf(out)).toEqual([]);
			expect(names(out)).toEqual([]);
		},
	);

	it.skipIf(isSmall).each(found)(
		"that gets no memory ends all with ARL_OOM, and its code: $kind",
		{ timeout: LIMIT },
		async (mpirun) => {
			const model = tinyPlace(folder).model;
			const config = JSON.parse(readFileSync(join(model, "config.json"), "utf8"));
			// Activations of more bytes than rank 1 may have addresses, which no rank comes to use.
			writeFileSync(join(model, "config.json"), JSON.stringify({ ...config, intermediate_size: 112_000 }));
			const { out, args } = train({ model_name_or_path: model, zero: 2, per_device_train_batch_size: 13 });
			const run = await arlOnRanks(mpirun, 2, args, { before: { 1: `ulimit -v ${3 << 20}` } });
			expect([run.code, errorsOf(run).length], run.stderr).toEqual([4, 1]);
			expect(run.stderr).toMatch(
				/ARL_OOM rank 1 \(host \S+, pid \d+\): the system refused \d+ MiB of memory for the Step pool/,
			);
			expect(pidsOf(out)).toEqual([]);
			expect(lastSaved(out)).toBe(0);
		},
	);

	it.each(found)(
		"whose core panics in a step ends all with ARL_INTERNAL and its message: $kind",
		{ timeout: LIMIT },
		async (mpirun) => {
			const { out, args } = train(ENDLESS);
			const run = await arlOnRanks(mpirun, 2, args, {
				before: { 1: `export NODE_OPTIONS="--import ${panicking(3)}"` },
			});
			expect([run.code, errorsOf(run).length], run.stderr).toEqual([1, 1]);
			expect(run.stderr).toMatch(/ARL_INTERNAL rank 1 \(host \S+, pid \d+\): the native part failed: out of bounds/);
			expect(pidsOf(out)).toEqual([]);
			expect(lastSaved(out)).toBe(2);
			await goesOn(out);
		},
	);

	it("whose disk takes no byte more ends all with ARL_IO, its path and host; the last checkpoint is whole", {
		timeout: LIMIT,
	}, async () => {
		const { out, args } = train(ENDLESS);
		const run = await at(
			args,
			() => lastSaved(out) >= 2,
			() => {
				const pid = pidsOf(out).find((one) => rankOf(one) === "1");
				// Files that this process writes may have no bytes from here on: of the two ranks it alone cannot save.
				return pid !== undefined && spawnSync("prlimit", ["--pid", String(pid), "--fsize=0"]).status === 0;
			},
		);
		expect([run.code, errorsOf(run).length], run.stderr).toEqual([1, 1]);
		expect(run.stderr).toMatch(/ARL_IO .*rank 1 \(host \S+, pid \d+\): .*File too large/);
		expect(errorsOf(run)[0]).toContain(join(out, ".checkpoint-"));
		expect(pidsOf(out)).toEqual([]);
		await goesOn(out);
	});
});

const disk = found.length === 0 ? null : SmallDisk.make("ranks on a disk that is full");

describe.skipIf(disk === null)("a disk that is full", () => {
	it("ends all ranks with one ARL_IO and its path; the last checkpoint is whole", { timeout: LIMIT }, async () => {
		const small = disk as SmallDisk;
		const { out, args } = train(ENDLESS, join(small.path, "out"));
		const run = await at(
			args,
			() => lastSaved(out) >= 2,
			() => {
				small.resize(small.usedKib() + 8);
				return true;
			},
		);
		expect([run.code, errorsOf(run).length], run.stderr).toEqual([1, 1]);
		expect(errorsOf(run)[0]).toMatch(
			/ARL_IO .*(no space left on device|No space left on device|are free on this disk)/,
		);
		expect(errorsOf(run)[0]).toContain(small.path);
		small.resize(64 * 1024);
		await goesOn(out);
	});
});

describe.skipIf(found.length === 0)("ranks that are signalled", () => {
	const inside = (file: string) => (out: string) => {
		const partial = partialOf(out);
		return lastSaved(out) >= 2 && partial !== undefined && existsSync(join(out, partial, file));
	};
	it.each([
		["before the first step", (out: string) => existsSync(join(out, ".arl-lock"))],
		["as a save begins", inside("")],
		["as a save ends", inside("arl/trainer_state.json")],
	] as [string, (out: string) => boolean][])(
		"save the same step, %s, and resume with equal bits",
		{ timeout: LIMIT },
		async (_, when) => {
			const { out, args } = train(ENDLESS);
			const run = await at(
				args,
				() => when(out),
				() => signalled(out),
			);
			expect([run.code, errorsOf(run)], run.stderr).toEqual([130, []]);
			expect(pidsOf(out)).toEqual([]);
			expect(partialOf(out)).toBeUndefined();
			await goesOn(out);
			// One rank that nothing has stopped.
			const step = `checkpoint-${lastSaved(out)}`;
			const whole = { max_steps: lastSaved(out), save_steps: lastSaved(out), gradient_accumulation_steps: 4 };
			const one = train({ ...ENDLESS, ...whole, full_determinism: true, zero: 0 });
			const reference = await arl(one.args);
			expect(reference.code, reference.stderr).toBe(0);
			const differing = differingFiles(join(out, step), join(one.out, step));
			const states = [
				"arl/engine.safetensors",
				"arl/state-00001-of-00002.safetensors",
				"arl/state-00002-of-00002.safetensors",
			];
			expect(differing.sort()).toEqual(states);
		},
	);
});
