/** Runs with an adapter that are killed and resumed: every file is as if nothing had happened. */
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { KILLS } from "./support/kills.js";
import { arl, differingFiles, flags, metricsOf, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const LORA = { use_peft: true, lora_r: 2, lora_target_modules: "all-linear", lora_modules_to_save: "norm" };

it(`kill -9 in ${KILLS} saves of a run with an adapter: the resumed run has the bits of the run never stopped`, async () => {
	const place = tinyPlace(folder, 24);
	const model = join(folder, "base");
	const train = (out: string, options: Record<string, string | number | boolean>) => [
		"train",
		...flags({
			model_name_or_path: model,
			train_file: place.file,
			output_dir: out,
			learning_rate: 1e-2,
			threads: 1,
			...options,
		}),
	];
	const based = await arl(
		train(model, { model_name_or_path: place.model, init_from_config: true, max_steps: 1, save_strategy: "no" }),
	);
	expect(based.code, based.stderr).toBe(0);
	const options = { ...LORA, per_device_train_batch_size: 2, max_steps: 12, save_steps: 1, logging_steps: 1 };
	const whole = join(folder, "whole");
	expect((await arl(train(whole, options))).code).toBe(0);
	const logged = (out: string) => metricsOf(out).map(({ step, loss, grad_norm }) => ({ step, loss, grad_norm }));
	let killed = 0;
	for (let i = 0; i < KILLS; i++) {
		const out = join(folder, `killed-${i}`);
		const step = 1 + ((i * 5) % 12);
		const saving = () => {
			const names = existsSync(out) ? readdirSync(out) : [];
			return names.some((name) => Number(/^\.checkpoint-(\d+)\.partial$/.exec(name)?.[1] ?? 0) >= step);
		};
		let timer: NodeJS.Timeout | undefined;
		const ended = await arl(train(out, options), (kill) => {
			timer = setInterval(() => saving() && kill("SIGKILL"), 1);
		});
		clearInterval(timer);
		if (ended.signal === "SIGKILL") killed += 1;
		const resumed = await arl(train(out, { ...options, resume_from_checkpoint: "latest" }));
		expect(resumed.code, resumed.stderr).toBe(0);
		expect(logged(out)).toEqual(logged(whole));
		expect(differingFiles(join(whole, "checkpoint-12"), join(out, "checkpoint-12")), `step ${step}`).toEqual([]);
		expect(readdirSync(out).filter((name) => /partial|old|removed/.test(name))).toEqual([]);
	}
	expect(killed).toBeGreaterThan(KILLS / 2);
}, 600_000);
