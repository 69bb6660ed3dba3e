import { existsSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { setBranchAside } from "../src/run/checkpoint/old-run.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { contents, metricsOf } from "./support/real.js";
import { events, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const SAVING: Options = { save_strategy: "steps", save_steps: 2 };
const checkpoints = (out: string) =>
	readdirSync(out)
		.filter((name) => name.startsWith("checkpoint-"))
		.sort();
const stepsOf = (out: string) => metricsOf(out).map(({ step }) => step);

/** A run of 8 steps with checkpoints 2, 4, 6 and 8, and the options that resume it after step 2. */
async function finished() {
	const place = workspace(folder);
	await trainer(place, SAVING).train();
	return { place, early: { ...SAVING, resume_from_checkpoint: join(place.out, "checkpoint-2") } };
}

/** Files of a run, without the tokens of its rows. */
const runFiles = (out: string) => new Map([...contents(out)].filter(([name]) => !name.startsWith(".cache/")));

const dyingAt = (step: number) =>
	fakeNative({
		onStep: (at) => {
			if (at === step) throw new Error("out of luck");
			return undefined;
		},
	});

describe("a run that resumes from an earlier checkpoint than its last", () => {
	it("sets later ones aside, says so, and removes them with its own first checkpoint", async () => {
		const { place, early } = await finished();
		const reported: string[] = [];
		for await (const event of trainer(place, early).run()) {
			if (event.type === "notice") reported.push(`${event.level}: ${event.message}`);
			if (event.type === "start") expect(checkpoints(place.out)).toEqual(["checkpoint-2"]);
			if (event.type === "saved" && event.step === 4) {
				expect(checkpoints(place.out)).toEqual(["checkpoint-2", "checkpoint-4"]);
				expect(existsSync(join(place.out, ".old-run"))).toBe(false);
			}
			if (event.type === "removed") reported.push(`${event.path} ${event.reason}`);
		}
		expect(reported).toEqual([
			"warning: checkpoints after step 2 are not of this run, and are set aside until this run has a complete checkpoint or model, and then removed: checkpoint-4, checkpoint-6, checkpoint-8",
			`${join(place.out, ".old-run")} replaced`,
		]);
		expect(checkpoints(place.out)).toEqual(["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]);
	});

	it("and is interrupted then resumes from its own newest checkpoint, not from the highest number", async () => {
		const { place, early } = await finished();
		const controller = new AbortController();
		const stopping = fakeNative({
			onStep: (step) => {
				if (step === 5) controller.abort();
				return undefined;
			},
		});
		await errorOf(trainer(place, early, stopping).train({ signal: controller.signal }));
		expect(checkpoints(place.out)).toEqual(["checkpoint-2", "checkpoint-4", "checkpoint-5"]);
		const rest = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(ofType(rest, "resumed")[0]?.step).toBe(5);
		expect(stepsOf(place.out)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
	});

	it("and fails before its first checkpoint has them back, with the log of their steps", async () => {
		const { place, early } = await finished();
		const before = runFiles(place.out);
		const error = await errorOf(trainer(place, early, dyingAt(4)).train());
		expect(error.hint).toContain("is restored");
		expect(runFiles(place.out)).toEqual(before);
		expect(stepsOf(place.out)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
	});

	it("and is killed before its first checkpoint leaves them to the next start", async () => {
		const { place } = await finished();
		const before = runFiles(place.out);
		await setBranchAside(place.out, 2);
		writeFileSync(join(place.out, "metrics.jsonl"), '{"step":1}\n{"step":2}\n{"step":3}\n');
		const all = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(ofType(all, "notice")[0]?.message).toContain("is restored");
		expect(ofType(all, "resumed")[0]?.step).toBe(8);
		const after = runFiles(place.out);
		for (const [name, bytes] of before)
			if (name.startsWith("checkpoint-")) expect(after.get(name), name).toEqual(bytes);
		expect(after.get("metrics.jsonl")).toEqual(before.get("metrics.jsonl"));
	});

	it("passes over damaged later ones, and sets them aside as well", async () => {
		const { place } = await finished();
		for (const step of [6, 8]) writeFileSync(join(place.out, `checkpoint-${step}`, "model.safetensors"), "torn");
		const all = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(ofType(all, "resumed")[0]?.step).toBe(4);
		expect(ofType(all, "notice").map(({ message }) => message)).toContainEqual(
			expect.stringContaining("checkpoint-6, checkpoint-8"),
		);
		expect(checkpoints(place.out)).toEqual(["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]);
	});

	it("into another output_dir leaves the first one as it is", async () => {
		const { place, early } = await finished();
		const before = runFiles(place.out);
		await trainer({ ...place, out: `${place.out}-other` }, early).train();
		expect(runFiles(place.out)).toEqual(before);
	});

	it("which is its last sets nothing aside", async () => {
		const { place } = await finished();
		for await (const event of trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }).run()) {
			if (event.type === "start") expect(existsSync(join(place.out, ".old-run"))).toBe(false);
			if (event.type === "notice") expect(event.message).not.toContain("aside");
		}
	});
});
