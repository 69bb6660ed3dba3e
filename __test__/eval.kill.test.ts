/** Runs that evaluate and keep the best checkpoint, killed in evaluations and in saves. */
import { existsSync, readdirSync, readFileSync, readlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { xoshiro128 } from "../src/data/sampler/order.js";
import { temporaryFolder } from "./support/folder.js";
import { KILLS } from "./support/kills.js";
import { arl, differingFiles, flags, metricsOf, type Place, root, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const AT_ONCE = 2;
/** 9 an epoch, of which there are 2.5. */
const STEPS = 23;

type EvalPlace = Place & { heldOut: string };

function command(place: EvalPlace, out: string, resume: boolean): string[] {
	const options = {
		model_name_or_path: place.model,
		train_file: place.file,
		output_dir: out,
		init_from_config: true,
		per_device_train_batch_size: 2,
		gradient_accumulation_steps: 2,
		num_train_epochs: 2.5,
		learning_rate: 1e-2,
		logging_steps: 1,
		eval_file: place.heldOut,
		eval_strategy: "steps",
		eval_steps: 2,
		per_device_eval_batch_size: 1,
		eval_generate: 1,
		load_best_model_at_end: true,
		// The loss of a model that begins at random falls all the time; this metric goes up and down.
		metric_for_best_model: "entropy",
		save_strategy: "steps",
		save_steps: 2,
		save_total_limit: 2,
		threads: 1,
		...(resume && { resume_from_checkpoint: "latest" }),
	};
	return ["train", ...flags(options)];
}

/** What a run logged, without times. */
const logged = (out: string) =>
	metricsOf(out).map(({ step, loss, grad_norm, eval_loss, eval_entropy, eval_exact_match, message, reply }) => {
		return { step, loss, grad_norm, eval_loss, eval_entropy, eval_exact_match, message, reply };
	});

/** Whether the evaluation after step `step`, or a later one, is in progress. */
function isEvaluating(out: string, step: number): boolean {
	const path = join(out, "metrics.jsonl");
	if (!existsSync(path)) return false;
	const last = readFileSync(path, "utf8").trimEnd().split("\n").at(-1) ?? "";
	const at = Number(/^\{"step":(\d+),.*"loss"/.exec(last)?.[1] ?? 0);
	return at >= step && at % 2 === 0 && !last.includes("eval_loss");
}

/** Whether a checkpoint of step `step` or a later one is being written. */
function isSaving(out: string, step: number): boolean {
	const names = existsSync(out) ? readdirSync(out) : [];
	return names.some((name) => Number(/^\.checkpoint-(\d+)\.partial$/.exec(name)?.[1] ?? 0) >= step);
}

describe("kill -9 in evaluations and saves", () => {
	it(`${KILLS} times, each then resumed: losses, evaluations, checkpoints and the best one are those of the run never stopped`, async () => {
		const heldOut = join(folder, "heldout.jsonl");
		const rows = readFileSync(join(root, "assets", "heldout.jsonl"), "utf8")
			.split("\n")
			.slice(0, 60);
		writeFileSync(heldOut, `${rows.join("\n")}\n`);
		const place = { ...tinyPlace(folder, 36), heldOut };
		const whole = `${place.out}-whole`;
		const first = await arl(command(place, whole, false));
		expect(first.code, first.stderr).toBe(0);
		const expected = logged(whole);
		const evaluations = expected.filter(({ eval_loss }) => eval_loss !== undefined);
		expect(evaluations.map(({ step }) => step)).toEqual(
			Array.from({ length: Math.floor(STEPS / 2) }, (_, i) => 2 * (i + 1)),
		);
		const best = readlinkSync(join(whole, "best"));
		const least = Math.min(...evaluations.map(({ eval_entropy }) => eval_entropy ?? Number.NaN));
		expect(best).toBe(`checkpoint-${evaluations.find(({ eval_entropy }) => eval_entropy === least)?.step}`);

		const next = xoshiro128([3, 14, 15, 92]);
		const found = { inEvaluation: 0, inSave: 0 };
		const one = async (i: number) => {
			const out = `${place.out}-${i}`;
			const step = 2 + Math.floor((next() / 2 ** 32) * 16);
			const wanted = i % 2 === 0 ? isEvaluating : isSaving;
			let timer: NodeJS.Timeout | undefined;
			const killed = await arl(command(place, out, false), (kill) => {
				timer = setInterval(() => wanted(out, step) && kill("SIGKILL"), 1);
			});
			clearInterval(timer);
			if (killed.signal === "SIGKILL" && wanted(out, step)) found[i % 2 === 0 ? "inEvaluation" : "inSave"] += 1;
			const resumed = await arl(command(place, out, true));
			const moment = `kill ${i} in ${i % 2 === 0 ? "an evaluation" : "a save"} from step ${step} on`;
			expect(resumed.code, `${moment}\n${killed.stderr}\n${resumed.stderr}`).toBe(0);
			expect(logged(out), moment).toEqual(expected);
			expect(readlinkSync(join(out, "best")), moment).toBe(best);
			expect(readlinkSync(join(out, "latest")), moment).toBe(readlinkSync(join(whole, "latest")));
			const names = readdirSync(whole).filter((name) => /^checkpoint-\d+$/.test(name));
			expect(readdirSync(out).filter((name) => /^checkpoint-\d+$/.test(name))).toEqual(names);
			for (const name of names)
				expect(differingFiles(join(whole, name), join(out, name)), `${moment}, ${name}`).toEqual([]);
			expect(readFileSync(join(out, "model.safetensors"))).toEqual(
				readFileSync(join(whole, best, "model.safetensors")),
			);
			expect(readdirSync(out).filter((name) => /partial|old|removed/.test(name))).toEqual([]);
		};
		const queue = Array.from({ length: KILLS }, (_, i) => i);
		const worker = async () => {
			for (let i = queue.shift(); i !== undefined; i = queue.shift()) await one(i);
		};
		await Promise.all(Array.from({ length: AT_ONCE }, worker));
		process.stderr.write(`kill -9 with evaluations: ${JSON.stringify(found)}\n`);
		expect(found.inEvaluation).toBeGreaterThan(0);
		expect(found.inSave).toBeGreaterThan(0);
	}, 600_000);
});
