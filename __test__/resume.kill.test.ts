import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { xoshiro128 } from "../src/data/sampler/order.js";
import { temporaryFolder } from "./support/folder.js";
import { KILLS } from "./support/kills.js";
import { arl, differingFiles, flags, metricsOf, type Place, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const AT_ONCE = 2;

function command(place: Place, out: string, resume: boolean): string[] {
	const options = {
		model_name_or_path: place.model,
		train_file: place.file,
		output_dir: out,
		init_from_config: true,
		per_device_train_batch_size: 2,
		gradient_accumulation_steps: 2,
		num_train_epochs: 2.5,
		learning_rate: 1e-2,
		lr_scheduler_type: "cosine",
		warmup_steps: 3,
		save_steps: 2,
		save_total_limit: 3,
		logging_steps: 3,
		threads: 1,
		...(resume && { resume_from_checkpoint: "latest" }),
	};
	return ["train", ...flags(options)];
}

/** The numbers that a run logged, without times. */
const logged = (out: string) =>
	metricsOf(out).map(({ step, epoch, loss, grad_norm, learning_rate, mean_token_accuracy, num_tokens }) => {
		return { step, epoch, loss, grad_norm, learning_rate, mean_token_accuracy, num_tokens };
	});

/** Whether a checkpoint of step `step` or a later one is being written. */
const isSaving = (out: string, step: number): boolean => {
	const names = existsSync(out) ? readdirSync(out) : [];
	return names.some((name) => Number(/^\.checkpoint-(\d+)\.partial$/.exec(name)?.[1] ?? 0) >= step);
};

describe("kill -9", () => {
	it(`at ${KILLS} random moments, saves included, each then resumed: weights, moments and losses are those of the run never stopped`, async () => {
		const place = tinyPlace(folder, 36);
		const whole = `${place.out}-whole`;
		const started = performance.now();
		const first = await arl(command(place, whole, false));
		let wallMs = performance.now() - started;
		expect(first.code, first.stderr).toBe(0);
		const expected = logged(whole);
		const last = readdirSync(whole).filter((name) => /^checkpoint-\d+$/.test(name)).length;
		expect(last).toBe(3);

		const next = xoshiro128([20, 26, 11, 22]);
		const moments = { killed: 0, beforeFirstSave: 0, midSave: 0, done: 0 };
		const one = async (i: number) => {
			const out = `${place.out}-${i}`;
			// Spread over the part of the run in which the engine works; the same moments each time, as far as time goes.
			const delay = wallMs * (0.25 + 0.75 * ((i + next() / 2 ** 32) / KILLS));
			// A quarter of the kills wait for a save that has begun; time alone seldom meets one.
			const step = i % 4 === 0 ? 1 + Math.floor((next() / 2 ** 32) * 20) : 0;
			const begun = performance.now();
			let timer: NodeJS.Timeout | undefined;
			const killed = await arl(command(place, out, false), (kill) => {
				if (step === 0) timer = setTimeout(() => kill("SIGKILL"), delay);
				else timer = setInterval(() => isSaving(out, step) && kill("SIGKILL"), 1);
			});
			clearTimeout(timer);
			if (killed.signal === "SIGKILL") moments.killed += 1;
			else {
				moments.done += 1;
				// The machine has less to do than when the first run was timed: the next kills come sooner.
				wallMs = Math.min(wallMs, performance.now() - begun);
			}
			const names = existsSync(out) ? readdirSync(out) : [];
			if (!names.some((name) => /^checkpoint-/.test(name))) moments.beforeFirstSave += 1;
			if (names.some((name) => name.endsWith(".partial"))) moments.midSave += 1;
			const resumed = await arl(command(place, out, true));
			const moment = step === 0 ? `after ${delay.toFixed(0)} ms` : `in a save from step ${step} on`;
			expect(resumed.code, `kill ${i} ${moment}\n${killed.stderr}\n${resumed.stderr}`).toBe(0);
			expect(logged(out)).toEqual(expected);
			for (const name of readdirSync(whole).filter((entry) => /^checkpoint-\d+$/.test(entry))) {
				expect(differingFiles(join(whole, name), join(out, name)), `kill ${i}, ${name}`).toEqual([]);
			}
			expect(readdirSync(out).filter((name) => /partial|old|removed/.test(name))).toEqual([]);
		};
		const queue = Array.from({ length: KILLS }, (_, i) => i);
		const worker = async () => {
			for (let i = queue.shift(); i !== undefined; i = queue.shift()) await one(i);
		};
		await Promise.all(Array.from({ length: AT_ONCE }, worker));
		process.stderr.write(`kill -9: ${JSON.stringify(moments)}\n`);
		expect(moments.killed).toBeGreaterThan(KILLS / 2);
		expect(moments.midSave).toBeGreaterThan(0);
	}, 600_000);
});
