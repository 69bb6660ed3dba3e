/** What only a GPU can show of `arl train`, rehearsed on the CPU: the checks run, and what they print can be read. */
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { root, sharedPath } from "./support/real.js";

function rehearse(...args: string[]) {
	const script = join(root, "bench", "gpu-train.mjs");
	const { status, stdout, stderr } = spawnSync(process.execPath, [script, "--device", "cpu", ...args], {
		encoding: "utf8",
	});
	const lines = stdout.trim().split("\n").filter(Boolean);
	return { status, stderr, cases: lines.map((line) => JSON.parse(line)) };
}

describe("the checks of arl train on a GPU, rehearsed on the CPU", { timeout: 300_000 }, () => {
	it("find a run that resumes after SIGTERM with the weights of one that was not stopped", () => {
		const { status, stderr, cases } = rehearse("--only", "sigterm");
		expect(status, stderr).toBe(0);
		expect(cases).toMatchObject([{ train: "sigterm", ok: true, exit_code: 130 }]);
	});

	it("compare the losses of ten steps", () => {
		const { status, stderr, cases } = rehearse("--only", "losses");
		expect(status, stderr).toBe(0);
		expect(cases).toMatchObject([
			{ train: "losses f32", ok: true, steps: 10, apart: 0 },
			{ train: "losses bf16", ok: true, steps: 10, apart: 0 },
		]);
	});

	const configs = sharedPath("bench/configs", "the loop and the bare engine");
	it.skipIf(configs === null)("compare the loop with the bare engine on the same micro-batches", () => {
		const { status, stderr, cases } = rehearse(
			"--only",
			"loop",
			"--model",
			"qwen3-cpu-8m",
			"--tokens",
			"512",
			"--steps",
			"3",
		);
		expect(status, stderr).toBe(0);
		expect(cases).toMatchObject([{ train: "loop", ok: true, steps: 3, goal: 1.02, submitted_ahead: { bare: 2 } }]);
	});

	it("end with what is missing where there is no GPU", () => {
		const script = join(root, "bench", "gpu-train.mjs");
		const env = { ...process.env, CUDA_VISIBLE_DEVICES: "" };
		const { status, stderr } = spawnSync(process.execPath, [script, "--device", "cuda"], { encoding: "utf8", env });
		expect(status).toBe(3);
		expect(stderr).toMatch(/device cuda: .+\./);
	});
});
