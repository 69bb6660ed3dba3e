import { cpSync, existsSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { ArlError } from "../src/errors.js";
import { checkpointsIn, openCheckpoint } from "../src/run/checkpoint/checkpoint.js";
import { isPublished } from "../src/run/checkpoint/publish.js";
import { temporaryFolder } from "./support/folder.js";
import { arl, contents, flags, metricsOf, tinyPlace } from "./support/real.js";
import { type Options, trainer, workspace } from "./support/run.js";
import { SmallDisk } from "./support/small-disk.js";

const folder = temporaryFolder();
const disk = SmallDisk.make("a disk that is full at every write");
const AMPLE_KIB = 64 * 1024;
const SAVING: Options = { save_strategy: "steps", save_steps: 2 };
const SHORT: Options = { ...SAVING, num_train_epochs: 1 };
const weights = (out: string) => readFileSync(join(out, "model.safetensors"), "utf8");

/** What is under a final name is whole: checkpoints, the model, the lines of the log. Returns the steps of the checkpoints. */
async function expectWhole(out: string, at: string): Promise<number[]> {
	const { own, foreign } = await checkpointsIn(out);
	expect(foreign, at).toEqual([]);
	for (const { path, step } of own) expect((await openCheckpoint(path)).state.step, at).toBe(step);
	if (existsSync(join(out, "config.json"))) expect(await isPublished(out), at).toBe(true);
	const log = join(out, "metrics.jsonl");
	if (existsSync(log)) {
		const text = readFileSync(log, "utf8");
		expect(text === "" || text.endsWith("\n"), at).toBe(true);
		for (const line of text.split("\n").slice(0, -1)) expect(() => JSON.parse(line), at).not.toThrow();
	}
	expect(existsSync(join(out, ".arl-lock")), at).toBe(false);
	return own.map(({ step }) => step);
}

/**
 * Runs with 4 KiB more each time until one gets through; `each` looks at what one that failed has left. `before`: what is on
 * the disk already, in addition to that room.
 */
async function growing(
	run: () => Promise<unknown>,
	each: (error: ArlError, at: string) => Promise<void>,
	before: () => void = () => {},
): Promise<number> {
	for (let kib = 4, failures = 0; kib < AMPLE_KIB; kib += 4) {
		const small = disk as SmallDisk;
		for (const name of readdirSync(small.path)) rmSync(join(small.path, name), { recursive: true });
		small.resize(AMPLE_KIB);
		before();
		small.resize(small.usedKib() + kib);
		const error = await run().then(
			() => null,
			(thrown: unknown) => thrown,
		);
		if (error === null) return failures;
		failures += 1;
		const at = `${kib} KiB: ${error}`;
		expect(error, at).toBeInstanceOf(ArlError);
		small.resize(AMPLE_KIB);
		await each(error as ArlError, at);
	}
	throw new Error("no size was enough");
}

describe.skipIf(disk === null)("a disk that is full at every write", { timeout: 120_000 }, () => {
	it.each([
		["with checkpoints", SHORT],
		["with a bound on their number", { ...SHORT, save_total_limit: 1 }],
		["with the model alone", { save_strategy: "no", num_train_epochs: 1 }],
	] as [string, Options][])(
		"%s: names the path and what to do, breaks nothing, and the run can be resumed",
		async (_, options) => {
			const place = workspace(folder);
			await trainer(place, options).train();
			const wanted = weights(place.out);
			const out = join(disk?.path ?? "", "out");
			const small = { ...place, out };
			const left = new Set<string>();
			const failures = await growing(
				() => trainer(small, options).train(),
				async (error, at) => {
					expect(error.code, at).toBe("ARL_IO");
					expect(error.message, at).toContain(out);
					expect(error.message, at).toMatch(/no space left on device|are free on this disk/);
					expect(error.hint, at).toMatch(/choose an(other)? output_dir/);
					left.add((await expectWhole(out, at)).join());
					await trainer(small, { ...options, resume_from_checkpoint: "latest" }).train();
					expect(weights(out), at).toBe(wanted);
					await expectWhole(out, at);
				},
			);
			expect(failures).toBeGreaterThan(3);
			// It filled up before the first checkpoint, between the two, and behind the last.
			if (options.save_strategy === "steps") expect(left.size).toBeGreaterThan(1);
		},
	);

	it("puts an old run back that was to be replaced, or has a whole one in its place", async () => {
		const place = workspace(folder);
		await trainer(place, SAVING).train();
		const old = contents(place.out);
		const out = join(disk?.path ?? "", "out");
		const options: Options = { ...SHORT, overwrite_output_dir: true };
		const outcomes = { old: 0, new: 0 };
		await growing(
			() => trainer({ ...place, out }, options).train(),
			async (_, at) => {
				const steps = await expectWhole(out, at);
				if (steps.includes(8)) {
					outcomes.old += 1;
					const now = contents(out);
					for (const [name, bytes] of old) expect(now.get(name)?.equals(bytes), `${at}: ${name}`).toBe(true);
				} else {
					outcomes.new += 1;
					expect(steps, at).toContain(2);
				}
				expect(readdirSync(out).filter((name) => name.startsWith(".old-run"))).toEqual([]);
			},
			() => cpSync(place.out, out, { recursive: true }),
		);
		expect(outcomes.old).toBeGreaterThan(0);
	});

	it("with the real core: at tokens, weights and state, the run ends with ARL_IO, and resumes when there is room", async () => {
		const place = tinyPlace(folder, 24);
		const small = disk as SmallDisk;
		const out = join(small.path, "out");
		const words = (to: string, resume = false) => [
			"train",
			...flags({
				model_name_or_path: place.model,
				train_file: place.file,
				output_dir: to,
				init_from_config: true,
				per_device_train_batch_size: 4,
				num_train_epochs: 1,
				save_steps: 2,
				logging_steps: 1,
				threads: 1,
				...(resume && { resume_from_checkpoint: "latest" }),
			}),
		];
		expect((await arl(words(place.out))).code).toBe(0);
		const wanted = contents(place.out);
		const bytes = [...wanted.values()].reduce((sum, file) => sum + file.length, 0);
		for (const share of [0.005, 0.02, 0.1, 0.25, 0.4, 0.55, 0.7]) {
			rmSync(out, { recursive: true, force: true });
			small.resize(Math.max(8, Math.round((bytes * share) / 1024)));
			const full = await arl(words(out));
			const at = `${share} of ${bytes} bytes: ${full.stderr}`;
			expect(full.code, at).toBe(1);
			expect(full.stderr, at).toMatch(/^ARL_IO .*disk\b|^ARL_IO .*o space left on device/m);
			expect(full.stderr, at).toContain(out);
			expect(full.stderr, at).toContain("what to do:");
			small.resize(AMPLE_KIB);
			await expectWhole(out, at);
			const resumed = await arl(words(out, true));
			expect(resumed.code, resumed.stderr).toBe(0);
			expect(metricsOf(out).map(({ loss }) => loss)).toEqual(metricsOf(place.out).map(({ loss }) => loss));
			expect(
				contents(out)
					.get("model.safetensors")
					?.equals(wanted.get("model.safetensors") as Buffer),
				at,
			).toBe(true);
		}
	});
});
