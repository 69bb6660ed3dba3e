import {
	copyFileSync,
	existsSync,
	mkdirSync,
	readdirSync,
	readFileSync,
	renameSync,
	rmSync,
	symlinkSync,
	writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { setOldRunAside, settleOldRun } from "../src/run/checkpoint/old-run.js";
import { onDataset, rowsOf } from "./support/code.js";
import { type Faults, fakeNative, writeFakeModel } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, contents, flags, tinyPlace } from "./support/real.js";
import { events, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const SAVING: Options = { save_strategy: "steps", save_steps: 2 };
const OVERWRITE: Options = { ...SAVING, overwrite_output_dir: true, num_train_epochs: 1 };

/** A finished run with everything that one may leave, and its files but for the tokens, which belong to no run alone. */
async function oldRun() {
	const place = workspace(folder);
	await onDataset(place, rowsOf(place), { ...SAVING, save_total_limit: 2 }).train();
	mkdirSync(join(place.out, ".arl-rows"));
	writeFileSync(join(place.out, ".arl-rows", "0a.ids"), "a list of documents");
	writeFileSync(join(place.out, "notes.txt"), "mine");
	const files = filesOf(place.out);
	for (const name of ["checkpoint-6/arl/manifest.json", "metrics.jsonl", "model.safetensors", ".arl-model.json"]) {
		expect([...files.keys()]).toContain(name);
	}
	expect([...files.keys()].some((name) => /^\.cache\/run-.*rows\.hashes$/.test(name))).toBe(true);
	return { place, files };
}

function filesOf(out: string): Map<string, Buffer> {
	const shared = (name: string) => name.startsWith(".cache/") && !name.startsWith(".cache/run-");
	return new Map([...contents(out)].filter(([name]) => !shared(name)));
}

const dying = (step: number): Faults => ({
	onStep: (at) => {
		if (at === step) throw new Error("out of luck");
		return undefined;
	},
});
const names = (out: string) => readdirSync(out).sort();
const aside = (out: string) => names(out).filter((name) => name.startsWith(".old-run"));

describe("a run that is to be replaced", () => {
	const failures: [string, Options, Faults][] = [
		["fails in its first step", {}, dying(1)],
		["fails in a step before its first checkpoint", {}, dying(2)],
		["has a loss that is not finite", {}, { onStep: () => Number.NaN }],
		[
			"cannot save",
			{},
			{
				onSaveState: () => {
					throw Object.assign(new Error("ENOSPC: no space left on device"), { code: "ENOSPC", syscall: "write" });
				},
			},
		],
		[
			"cannot write its model",
			{ save_strategy: "no" },
			{
				onExport: () => {
					throw Object.assign(new Error("ENOSPC: no space left on device"), { code: "ENOSPC", syscall: "write" });
				},
			},
		],
	];
	it.each(failures)("is put back, file by file, where the new one %s", async (_, options, faults) => {
		const { place, files } = await oldRun();
		const error = await errorOf(trainer(place, { ...OVERWRITE, ...options }, fakeNative(faults)).train());
		expect(error.hint).toContain(`What was in ${place.out} before is restored.`);
		const after = filesOf(place.out);
		// The batch of a step that is not finite is for the user to read.
		after.delete("nonfinite-step-1.json");
		expect(after).toEqual(files);
	});

	it("is put back where rows from code are trained next, and the new run's notes of its rows go", async () => {
		const { place, files } = await oldRun();
		await errorOf(onDataset(place, rowsOf(place), OVERWRITE, fakeNative(dying(1))).train());
		expect(filesOf(place.out)).toEqual(files);
	});

	it("is put back where the new one is stopped, or its reader leaves, before a step", async () => {
		const { place, files } = await oldRun();
		for await (const event of trainer(place, OVERWRITE).run()) {
			if (event.type !== "start") continue;
			expect(aside(place.out)).toEqual([".old-run"]);
			expect(existsSync(join(place.out, "checkpoint-8"))).toBe(false);
			break;
		}
		expect(filesOf(place.out)).toEqual(files);
		const controller = new AbortController();
		const seen: string[] = [];
		for await (const event of trainer(place, OVERWRITE).run({ signal: controller.signal })) {
			if (event.type === "start") controller.abort();
			if (event.type === "notice") seen.push(event.message);
		}
		expect(seen.at(-1)).toContain("is restored");
		expect(filesOf(place.out)).toEqual(files);
	});

	it("is there untouched where the new one is refused", async () => {
		const { place, files } = await oldRun();
		for (const [options, faults] of [
			[{ lr_scheduler_kwargs: { nope: 1 } }, {}],
			[{}, { availableBytes: 1000 }],
			[{ train_file: join(folder, "missing.jsonl") }, {}],
		] as [Options, Faults][]) {
			await errorOf(trainer(place, { ...OVERWRITE, ...options }, fakeNative(faults)).train());
			expect(filesOf(place.out)).toEqual(files);
		}
	});

	it("goes with the new one's first checkpoint, and not before", async () => {
		const { place } = await oldRun();
		const reported: string[] = [];
		for await (const event of trainer(place, OVERWRITE).run()) {
			if (event.type === "notice") reported.push(event.message);
			if (event.type === "step" && event.step === 2) expect(aside(place.out)).toEqual([".old-run"]);
			if (event.type === "saved") expect(aside(place.out)).toEqual([]);
			if (event.type === "removed") reported.push(`${event.path} ${event.reason}`);
		}
		expect(reported).toContain(
			`what was in ${place.out} is set aside until this run has a complete checkpoint or model, and then removed: checkpoint-6, checkpoint-8, config.json, metrics.jsonl and 3 more`,
		);
		expect(reported).toContain(`${join(place.out, ".old-run")} replaced`);
		expect(names(place.out).filter((name) => !name.startsWith("."))).toEqual([
			"checkpoint-2",
			"checkpoint-4",
			"config.json",
			"latest",
			"metrics.jsonl",
			"model.safetensors",
			"notes.txt",
			"report.html",
			"run.json",
		]);
		expect(existsSync(join(place.out, ".arl-rows"))).toBe(false);
	});

	it("goes with the new one's model where no checkpoint is written", async () => {
		const { place } = await oldRun();
		const before = readFileSync(join(place.out, "model.safetensors"), "utf8");
		const all = await events(trainer(place, { ...OVERWRITE, save_strategy: "no" }));
		expect(ofType(all, "removed").at(-1)?.reason).toBe("replaced");
		expect(aside(place.out)).toEqual([]);
		expect(names(place.out).filter((name) => name.startsWith("checkpoint-"))).toEqual([]);
		expect(readFileSync(join(place.out, "model.safetensors"), "utf8")).not.toBe(before);
	});

	it("with a learning rate of 0 that a schedule divides by is not touched: the schedule is refused first", async () => {
		const { place, files } = await oldRun();
		for (const [name, kwargs] of [
			["cosine_with_min_lr", { min_lr: 1e-5 }],
			["cosine_warmup_with_min_lr", { min_lr: 1e-5 }],
			["polynomial", {}],
			["inverse_sqrt", { timescale: -5 }],
		] as ["cosine_with_min_lr", Record<string, number>][]) {
			const options = { ...OVERWRITE, learning_rate: 0, lr_scheduler_type: name, lr_scheduler_kwargs: kwargs };
			const error = await errorOf(trainer(place, options).train());
			expect(error, name).toMatchObject({ code: "ARL_CONFIG", exitCode: 2 });
		}
		expect(filesOf(place.out)).toEqual(files);
	});
});

describe("a process that is killed while a run takes another one's place", () => {
	/** The folder as a kill leaves it at each moment of the move, and whether the new run has a checkpoint by then. */
	const moments: [string, (out: string) => Promise<void> | void, boolean][] = [
		[
			"while it is set aside",
			async (out) => {
				await setOldRunAside(out, null);
				renameSync(join(out, ".old-run"), join(out, ".old-run.partial"));
				// Some of it has not been moved yet.
				for (const name of ["metrics.jsonl", "checkpoint-8", "model.safetensors"]) {
					renameSync(join(out, ".old-run.partial", name), join(out, name));
				}
			},
			false,
		],
		[
			"before anything is moved",
			(out) => {
				mkdirSync(join(out, ".old-run.partial"));
				writeFileSync(join(out, ".old-run.partial", "old-run.json"), '{"vers');
			},
			false,
		],
		[
			"in the new run's first steps",
			async (out) => {
				await setOldRunAside(out, null);
				writeFileSync(join(out, "metrics.jsonl"), '{"step":1}\n');
				mkdirSync(join(out, ".arl-rows"));
				mkdirSync(join(out, ".cache", "run-new"));
			},
			false,
		],
		[
			"in the new run's first save",
			async (out) => {
				await setOldRunAside(out, null);
				mkdirSync(join(out, ".checkpoint-2.partial", "arl"), { recursive: true });
			},
			false,
		],
		[
			"while the new run's model is put in its place",
			async (out) => {
				await setOldRunAside(out, null);
				writeFileSync(join(out, ".arl-model.json"), '["model.safetensors","config.json"]');
				writeFileSync(join(out, "model.safetensors"), "new");
				writeFileSync(join(out, ".config.json.partial"), "{}");
			},
			false,
		],
		[
			"behind the new run's first checkpoint",
			async (out) => {
				await setOldRunAside(out, null);
				mkdirSync(join(out, "checkpoint-2", "arl"), { recursive: true });
				writeFileSync(join(out, "checkpoint-2", "arl", "manifest.json"), "{}");
			},
			true,
		],
		[
			"behind the new run's model",
			async (out) => {
				await setOldRunAside(out, null);
				writeFileSync(join(out, ".arl-model.json"), '["config.json"]');
				writeFileSync(join(out, "config.json"), "{}");
			},
			true,
		],
		[
			"while the old run is removed",
			async (out) => {
				await setOldRunAside(out, null);
				renameSync(join(out, ".old-run"), join(out, ".old-run.removed"));
				rmSync(join(out, ".old-run.removed", "checkpoint-6"), { recursive: true });
				mkdirSync(join(out, "checkpoint-2", "arl"), { recursive: true });
				writeFileSync(join(out, "checkpoint-2", "arl", "manifest.json"), "{}");
			},
			true,
		],
	];
	it.each(moments)("%s: the next start finds one of the two, whole", async (_, kill, isNew) => {
		const { place, files } = await oldRun();
		await kill(place.out);
		// Refused, since the folder holds a run; but first it is brought into order.
		const error = await errorOf(trainer(place).train());
		expect(error.message).toContain("holds another run");
		expect(aside(place.out)).toEqual([]);
		if (!isNew) return expect(filesOf(place.out)).toEqual(files);
		expect(existsSync(join(place.out, "checkpoint-6"))).toBe(false);
		return expect(readFileSync(join(place.out, "notes.txt"), "utf8")).toBe("mine");
	});

	it("is repeated by the next start until it is done: a kill while the old run is put back loses nothing", async () => {
		const { place, files } = await oldRun();
		await setOldRunAside(place.out, null);
		renameSync(join(place.out, ".old-run"), join(place.out, ".old-run.partial"));
		for (const name of ["checkpoint-6", ".arl-rows"]) {
			renameSync(join(place.out, ".old-run.partial", name), join(place.out, name));
		}
		expect(await settleOldRun(place.out)).toContain("is restored");
		expect(filesOf(place.out)).toEqual(files);
		expect(await settleOldRun(place.out)).toBeNull();
	});

	it("by kill -9 in its first steps: what it was to replace is there again, and can be resumed", async () => {
		const place = tinyPlace(folder);
		const words = (more: Record<string, string | number | boolean>) => {
			const fixed = { model_name_or_path: place.model, train_file: place.file, output_dir: place.out, threads: 1 };
			const run = {
				init_from_config: true,
				per_device_train_batch_size: 1,
				logging_steps: 1,
				lr_scheduler_type: "constant",
			};
			return ["train", ...flags({ ...fixed, ...run, ...more })];
		};
		expect((await arl(words({ max_steps: 3 }))).code).toBe(0);
		const files = filesOf(place.out);
		const killed = await arl(words({ max_steps: 100_000, overwrite_output_dir: true }), (kill) => {
			const timer = setInterval(() => {
				if (!existsSync(join(place.out, ".old-run")) || !existsSync(join(place.out, "metrics.jsonl"))) return;
				clearInterval(timer);
				kill("SIGKILL");
			}, 5);
		});
		expect(killed.signal).toBe("SIGKILL");
		expect(existsSync(join(place.out, "checkpoint-3"))).toBe(false);
		const refused = await arl(words({ max_steps: 3 }));
		expect(refused.stderr).toContain(`What was in ${place.out} before is restored.`);
		const left = filesOf(place.out);
		left.delete(".arl-lock");
		expect(left).toEqual(files);
		const resumed = await arl(words({ max_steps: 5, resume_from_checkpoint: "latest" }));
		expect(resumed.code, resumed.stderr).toBe(0);
		expect(resumed.stderr).toContain("after step 3");
	});

	it("leaves a folder of this name alone that is none of its own", async () => {
		const { place } = await oldRun();
		mkdirSync(join(place.out, ".old-run"));
		writeFileSync(join(place.out, ".old-run", "thesis.txt"), "mine");
		const error = await errorOf(trainer(place, OVERWRITE).train());
		expect(error).toMatchObject({ code: "ARL_STATE" });
		expect(error.message).toContain(join(place.out, ".old-run"));
		expect(readFileSync(join(place.out, ".old-run", "thesis.txt"), "utf8")).toBe("mine");
	});
});

describe("a model inside the output_dir of the run that starts from it", () => {
	const places: [string, (out: string, model: string) => string][] = [
		["a checkpoint", (out) => join(out, "checkpoint-6")],
		[
			"a folder in a checkpoint",
			(out, model) => {
				const path = join(out, "checkpoint-6", "base");
				mkdirSync(path);
				return writeFakeModel(path, JSON.parse(readFileSync(join(model, "config.json"), "utf8")));
			},
		],
		[
			"a link to a checkpoint",
			(out) => {
				const path = `${out}-link`;
				symlinkSync(join(out, "checkpoint-8"), path);
				return path;
			},
		],
		[
			"a folder whose weights are a link to the published model",
			(out, model) => {
				const path = `${out}-model`;
				mkdirSync(path);
				copyFileSync(join(model, "config.json"), join(path, "config.json"));
				symlinkSync(join(out, "model.safetensors"), join(path, "model.safetensors"));
				return path;
			},
		],
	];
	it.each(places)("is refused with what to do: %s", async (_, make) => {
		const { place } = await oldRun();
		const model = make(place.out, place.model);
		const before = filesOf(place.out);
		for (const options of [OVERWRITE, { ...SAVING, resume_from_checkpoint: "latest" as const }, SAVING]) {
			const error = await errorOf(trainer({ ...place, model }, options).train());
			expect(error).toMatchObject({ code: "ARL_CONFIG", exitCode: 2 });
			expect(error.message).toMatch(/^model_name_or_path: .* is in output_dir, where this run would remove or replace/);
			expect(error.hint).toContain("copy the model to another place first");
		}
		expect(filesOf(place.out)).toEqual(before);
	});

	it("is trained from a folder there that no run touches, and from a checkpoint of another output_dir", async () => {
		const { place } = await oldRun();
		const base = join(place.out, "base");
		mkdirSync(base);
		writeFakeModel(base);
		await trainer({ ...place, model: base }, OVERWRITE).train();
		expect(existsSync(join(base, "model.safetensors"))).toBe(true);
		const next = { ...place, model: join(place.out, "checkpoint-4"), out: `${place.out}-next` };
		await trainer(next, SAVING).train();
	});

	it("a template that goes with the old run is refused as well", async () => {
		const { place } = await oldRun();
		const template = join(place.out, "chat_template.jinja");
		writeFileSync(template, "{{ messages }}");
		const error = await errorOf(trainer(place, { ...OVERWRITE, chat_template: template }).train());
		expect(error.message).toContain(`chat_template: ${template} is in output_dir`);
		expect(existsSync(template)).toBe(true);
	});
});
