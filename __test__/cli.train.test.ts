import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeEach, describe, expect, it } from "vitest";
import { run as doctor } from "../src/cli/doctor.js";
import { run as train } from "../src/cli/train.js";
import { ArlError } from "../src/errors.js";
import { type Faults, fakeNative, writeFakeModel } from "./support/fake-native.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { metricsOf } from "./support/real.js";

const folder = temporaryFolder();

const output = capturedOutput();

let out = "";
let runs = 0;
beforeEach(() => {
	out = join(folder, `out-${runs++}`);
});

const modelDir = join(folder, "model");
mkdirSync(modelDir);
writeFakeModel(modelDir);
const rows = join(folder, "rows.jsonl");
writeFileSync(
	rows,
	Array.from(
		{ length: 12 },
		(_, i) => `{"messages":[{"role":"user","content":"q${i}"},{"role":"assistant","content":"a${i}"}]}\n`,
	).join(""),
);

function words(...more: string[]): string[] {
	const fixed = ["--model_name_or_path", modelDir, "--train_file", rows, "--output_dir", out];
	return [...fixed, "--per_device_train_batch_size", "2", "--num_train_epochs", "1", "--logging_steps", "2", ...more];
}

const run = (given: string[], faults: Faults = {}) => train(given, () => fakeNative(faults));
const events = () =>
	output.stdout
		.trimEnd()
		.split("\n")
		.map((line) => JSON.parse(line) as Record<string, unknown>);

describe("arl train", () => {
	it("ends with 0 and says where the model and the metrics are", async () => {
		expect(await run(words())).toBe(0);
		expect(output.stderr).toContain("step 2  epoch ");
		expect(output.stderr).toContain(`model    ${out}`);
		expect(output.stderr).toContain(`metrics  ${join(out, "metrics.jsonl")}`);
		expect(output.stdout).toBe("");
		expect(metricsOf(out).map(({ step }) => step)).toEqual([2, 4, 6]);
	});

	it("--json prints every event on stdout", async () => {
		expect(await run(words("--json"))).toBe(0);
		const types = events().map(({ type }) => type);
		for (const type of ["start", "step", "log", "saved", "end"]) expect(types).toContain(type);
		expect(types.at(-1)).toBe("end");
		expect(types.filter((type) => type === "step")).toHaveLength(6);
	});

	it("ends with 130 after SIGINT, with a checkpoint, from which it goes on to the end", async () => {
		const disk = new Map();
		const interrupted = (step: number) => {
			if (step === 3) process.emit("SIGINT", "SIGINT");
			return undefined;
		};
		expect(await train(words("--json"), () => fakeNative({ onStep: interrupted }, disk))).toBe(130);
		expect(events().at(-1)).toMatchObject({ type: "end", outcome: "interrupted" });
		expect(process.listenerCount("SIGINT")).toBe(0);
		output.stdout = "";
		expect(await train(words("--json", "--resume_from_checkpoint", "latest"), () => fakeNative({}, disk))).toBe(0);
		expect(events().at(-1)).toMatchObject({ type: "end", outcome: "completed", steps: 6 });
	});

	it("ends with 5 where the loss is not finite", async () => {
		expect(await run(words(), { onStep: (step) => (step === 2 ? Number.NaN : undefined) })).toBe(5);
		expect(output.stderr).toContain("ARL_NONFINITE");
	});

	it("ends with 3 where a row cannot be used, and writes no model", async () => {
		const bad = join(folder, "bad.jsonl");
		writeFileSync(bad, `${readFileSync(rows, "utf8")}not json\n`);
		expect(await run([...words(), "--train_file", bad])).toBe(3);
		expect(output.stderr).toContain(`${bad}:13`);
		expect(existsSync(join(out, "model.safetensors"))).toBe(false);
	});

	it("ends with the code of whatever the core says", async () => {
		const fail = () => {
			throw new ArlError("ARL_OOM", "12 GB are needed and 2 GB are there", "Lower per_device_train_batch_size.");
		};
		expect(await run(words("--json"), { onStep: fail })).toBe(4);
		expect(events().at(-1)).toMatchObject({ type: "error", code: "ARL_OOM", exitCode: 4 });
	});
});

describe("arl doctor", () => {
	it("names the devices and ends with 0", async () => {
		expect(await doctor([], () => fakeNative())).toBe(0);
		expect(output.stdout).toMatch(/^ok +node +\d+\./m);
		expect(output.stdout).toMatch(/^ok +device cpu +fake, 1 threads/m);
	});

	it("says what to do where the core is missing, and ends with 1", async () => {
		const missing = () => {
			throw new ArlError("ARL_DEVICE", "the addon is missing", "Run `npm run build`.");
		};
		expect(await doctor(["--json"], missing)).toBe(1);
		expect(JSON.parse(output.stdout)).toContainEqual({
			name: "core",
			value: "the addon is missing",
			ok: false,
			hint: "Run `npm run build`.",
		});
	});
});
