/** Ranks that divide moments, gradients and weights, on the real core: their bits, their checkpoints, and a save that is cut off. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import type { Mpirun } from "../src/launch/mpi.js";
import { eightSteps, LIMIT } from "./support/eight-steps.js";
import { temporaryFolder } from "./support/folder.js";
import { arlOnRanks, mpiruns, pidsOf, rankOf } from "./support/ranks.js";
import { arl, differingFiles, type Ended, metricsOf } from "./support/real.js";

const found = mpiruns();
const first = found[0] as Mpirun;
const folder = temporaryFolder();
const { train } = eightSteps(folder, { save_steps: 3 });

const figures = (out: string) => metricsOf(out).map(({ step, loss, grad_norm }) => [step, loss, grad_norm]);

function succeeded(run: Ended): void {
	expect(run.code, run.stderr).toBe(0);
}

/** The names of the states that ranks write. */
const pieces = (ranks: number) =>
	Array.from({ length: ranks }, (_, i) => `arl/state-0000${i + 1}-of-0000${ranks}.safetensors`);

/** Files that a save writes one after the other. */
const KILL_POINTS = [
	"the folder",
	"config.json",
	"tokenizer.json",
	"model.safetensors",
	...pieces(2).map((name) => `${name}.partial`),
	...pieces(2),
	"arl/trainer_state.json",
	"arl/manifest.json",
];

describe.skipIf(found.length === 0)("ranks that divide moments and gradients", () => {
	const bf16 = { bf16: true };
	const references = new Map<string, string>();
	const referenceOf = (type: object) => references.get(JSON.stringify(type)) as string;

	beforeAll(async () => {
		for (const type of [{}, bf16]) {
			const { out, args } = train({ ...type, full_determinism: true, gradient_accumulation_steps: 4 });
			succeeded(await arl(args));
			references.set(JSON.stringify(type), out);
		}
	}, LIMIT);

	it.each([
		[2, 1, {}],
		[2, 2, bf16],
		[4, 3, {}],
	])("have the bits of one: %i ranks, zero %i, %o", { timeout: LIMIT }, async (ranks, zero, type) => {
		const reference = referenceOf(type);
		const several = train({ ...type, zero, gradient_accumulation_steps: 4 / ranks });
		const run = await arlOnRanks(first, ranks, several.args);
		succeeded(run);
		expect(run.stderr).toContain(`zero ${zero}: ${ranks} ranks divide ${zero === 3 ? "weights, " : ""}`);
		expect(figures(several.out)).toEqual(figures(reference));
		// Each rank writes a state of its own; the model is byte for byte that of one rank.
		for (const step of ["checkpoint-3", "checkpoint-8"]) {
			const differing = differingFiles(join(several.out, step), join(reference, step));
			expect(differing.sort()).toEqual(["arl/engine.safetensors", ...pieces(ranks)]);
		}
		expect(readFileSync(join(several.out, "model.safetensors"))).toEqual(
			readFileSync(join(reference, "model.safetensors")),
		);

		// One rank resumes, and leaves what one rank alone leaves, its state included; so do others.
		const from = { ...type, resume_from_checkpoint: join(several.out, "checkpoint-3") };
		const one = train({ ...from, full_determinism: true, gradient_accumulation_steps: 4 });
		succeeded(await arl(one.args));
		expect(differingFiles(join(one.out, "checkpoint-8"), join(reference, "checkpoint-8"))).toEqual([]);
		const other = train({ ...from, zero: 2, gradient_accumulation_steps: ranks === 2 ? 1 : 2 });
		succeeded(await arlOnRanks(found.at(-1) as Mpirun, ranks === 2 ? 4 : 2, other.args));
		const differing = differingFiles(join(other.out, "checkpoint-8"), join(reference, "checkpoint-8"));
		expect(differing.every((name) => name.startsWith("arl/"))).toBe(true);
	});

	it("resume what one rank has saved", { timeout: LIMIT }, async () => {
		const reference = referenceOf(bf16);
		const from = { ...bf16, resume_from_checkpoint: join(reference, "checkpoint-3") };
		const two = train({ ...from, gradient_accumulation_steps: 2 });
		const run = await arlOnRanks(first, 2, two.args);
		succeeded(run);
		expect(run.stderr).toContain("zero 2 (auto): 2 ranks divide ");
		const differing = differingFiles(join(two.out, "checkpoint-8"), join(reference, "checkpoint-8"));
		expect(differing.sort()).toEqual(["arl/engine.safetensors", ...pieces(2)]);
	});

	it.each(KILL_POINTS)(
		"leave the old checkpoint in force where one is killed during a save: once there is %s",
		{ timeout: LIMIT },
		async (point) => {
			const shape = { save_steps: 1, save_total_limit: 3, gradient_accumulation_steps: 2 };
			const endless = { ...shape, max_steps: 1_000_000, lr_scheduler_type: "constant" };
			const { out, args } = train({ ...endless, zero: 2 });
			let struck = false;
			const timer = setInterval(() => {
				if (struck || !existsSync(join(out, "checkpoint-2"))) return;
				const partial = readdirSync(out).find((name) => name.endsWith(".partial") && name.startsWith(".checkpoint-"));
				if (partial === undefined || !existsSync(join(out, partial, point === "the folder" ? "" : point))) return;
				const pid = pidsOf(out).find((one) => rankOf(one) === "1");
				if (pid === undefined) return;
				struck = true;
				process.kill(pid, "SIGKILL");
			}, 1);
			const run = await arlOnRanks(first, 2, args).finally(() => clearInterval(timer));
			expect(struck, run.stderr).toBe(true);
			expect(run.code).not.toBe(0);
			expect(pidsOf(out)).toEqual([]);
			// Whatever the moment was, what is there is whole, and the next run takes it.
			const saved = Math.max(...readdirSync(out).map((name) => Number(/^checkpoint-(\d+)$/.exec(name)?.[1] ?? 0)));
			const resumed = train({ ...endless, max_steps: saved + 1, resume_from_checkpoint: "latest" }, out);
			const next = await arlOnRanks(first, 2, resumed.args);
			succeeded(next);
			expect(readdirSync(out).filter((name) => name.endsWith(".partial"))).toEqual([]);
			expect(existsSync(join(out, `checkpoint-${saved + 1}`))).toBe(true);
		},
	);
});
