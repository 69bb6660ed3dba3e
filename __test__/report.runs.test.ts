import { appendFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { run as diff } from "../src/cli/runs-diff.js";
import { run as ls } from "../src/cli/runs-ls.js";
import { run as show } from "../src/cli/runs-show.js";
import { run as train } from "../src/cli/train.js";
import { run as watch } from "../src/cli/watch.js";
import { RunReader } from "../src/report/runs/read-run.js";
import { type RunRecord, readRecord, writeRecord } from "../src/report/runs/record.js";
import { Samples } from "../src/report/runs/samples.js";
import { baseOf, chatCommand, resultFolder, shellWord } from "../src/report/runs/sentences.js";
import { MetricsTable } from "../src/report/runs/table.js";
import { sparkline, watchLines } from "../src/report/runs/watch.js";
import { type Faults, fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { metricsOf } from "./support/real.js";
import { events, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const SAVING = { save_strategy: "steps", save_steps: 2 } as const;

/** The record of a run that must have one. */
function recordOf(out: string): RunRecord {
	const record = readRecord(out);
	if (record === null) throw new Error(`${out} has no record`);
	return record;
}

function readerOf(out: string): RunReader {
	const reader = new RunReader(out);
	reader.update();
	return reader;
}

describe("a table of metrics", () => {
	it("keeps first, last, lowest and highest exactly, and every extreme in its curve, in bounded memory", () => {
		fc.assert(
			fc.property(
				fc.array(fc.float({ noNaN: true, min: -1e6, max: 1e6 }), { minLength: 1, maxLength: 400 }),
				(values) => {
					const table = new MetricsTable(8);
					values.forEach((value, i) => void table.add(i + 1, [["loss", value]]));
					const extent = table.extent("loss");
					expect(extent).toMatchObject({
						first: { step: 1, value: values[0] },
						last: { step: values.length, value: values.at(-1) },
						lowest: { value: Math.min(...values) },
						highest: { value: Math.max(...values) },
						count: values.length,
					});
					const { steps, metrics } = table.curves(["loss"], 16, ["loss"]);
					expect(steps.length).toBeLessThanOrEqual(16);
					expect(steps.at(-1)).toBe(values.length);
					expect([...steps].sort((a, b) => a - b)).toEqual(steps);
					const high = (metrics.loss?.high ?? metrics.loss?.mean ?? []) as number[];
					expect(Math.max(...high)).toBe(Number(Math.max(...values).toPrecision(5)));
				},
			),
		);
	});

	it("gives the mean of each bucket", () => {
		const table = new MetricsTable(2);
		for (let step = 1; step <= 8; step++) table.add(step, [["loss", step]]);
		expect(table.curves(["loss"], 4, ["loss"])).toEqual({
			steps: [2, 4, 6, 8],
			metrics: { loss: { mean: [1.5, 3.5, 5.5, 7.5], low: [1, 3, 5, 7], high: [2, 4, 6, 8] } },
		});
		expect(table.curves(["loss"], 2).metrics.loss).toEqual({ mean: [2.5, 6.5] });
	});

	it("has gaps where a metric has no value, and leaves out values that are not finite", () => {
		const table = new MetricsTable(10);
		table.add(1, [["loss", Number.NaN]]);
		table.add(2, [["loss", 3]]);
		table.add(3, [["other", 1]]);
		expect(table.curves(["loss", "other", "none"], 10).metrics).toEqual({
			loss: { mean: [null, 3, null] },
			other: { mean: [null, null, 1] },
		});
	});
});

describe("samples", () => {
	const line = (step: number, row: number, reply: string) => ({
		event: "sample",
		step,
		location: `eval.jsonl:${row}`,
		message: 1,
		prompt: "user: ?",
		expected: "yes",
		reply,
		right: reply === "yes",
	});

	it("are the first and the latest reply of each row, in bounded memory", () => {
		const samples = new Samples();
		for (let row = 1; row <= 100; row++) {
			samples.add(line(0, row, "no"));
			samples.add(line(10, row, "yes"));
		}
		const { rows, others } = samples.within(1e6);
		expect(rows.length + others).toBe(100);
		expect(rows[0]).toMatchObject({
			location: "eval.jsonl:1",
			before: { step: 0, text: "no", right: false },
			now: { step: 10, text: "yes", right: true },
		});
		expect(samples.within(1000).rows.length).toBeLessThan(rows.length);
	});

	it("of another shape are passed over, and long ones cut", () => {
		const samples = new Samples();
		samples.add({ step: 1, location: 3 });
		samples.add(line(1, 1, "x".repeat(1e5)));
		const { rows } = samples.within(1e6);
		expect(rows).toHaveLength(1);
		expect(rows[0]?.now.text.length).toBeLessThan(3000);
	});
});

describe("a run", () => {
	it("leaves a record of its configuration, rows, checkpoints and end", async () => {
		const place = workspace(folder);
		await trainer(place, { ...SAVING, run_name: "first", learning_rate: 1e-4 }).train();
		const record = recordOf(place.out);
		expect(record).toMatchObject({
			state: "completed",
			name: "first",
			error: null,
			end: { outcome: "completed", steps: 8 },
		});
		expect(record.saves.map(({ step }) => step)).toEqual([2, 4, 6, 8]);
		expect(record.rows).toMatchObject({ rows: 22, complete: true });
		expect(record.options.find(({ name }) => name === "learning_rate")).toEqual({
			name: "learning_rate",
			value: 1e-4,
			isDefault: false,
		});
		expect(record.options.find(({ name }) => name === "adam_beta1")?.isDefault).toBe(true);
		const reader = readerOf(place.out);
		expect(record.figures).toEqual(reader.figures);
		const losses = metricsOf(place.out).map(({ loss }) => loss as number);
		expect(record.figures?.training.loss).toMatchObject({
			first: { step: 1, value: losses[0] },
			last: { step: 8, value: losses[7] },
			best: { value: Math.min(...losses) },
		});
	});

	it("writes no secret", async () => {
		const place = workspace(folder);
		const address = "mongodb://user:hunter2@127.0.0.1:1/x?serverSelectionTimeoutMS=50";
		const { options } = recordOf((await trainer(place, {}).train()).outputDir);
		expect(options.find(({ name }) => name === "db_connection_string")?.value).toBe(null);
		const { shownOptions } = await import("../src/config/print.js");
		const shown = shownOptions({ ...trainer(place).args, db_connection_string: address, chat_template: address });
		expect(JSON.stringify(shown)).not.toContain("hunter2");
		expect(shown.find(({ name }) => name === "db_connection_string")?.value).toBe("***");
	});

	it("that is resumed has all its parts, and lists only checkpoints that exist", async () => {
		const place = workspace(folder);
		const options = { ...SAVING, save_total_limit: 1 };
		const disk = new Map();
		let last = 0;
		const run = trainer(place, options, fakeNative({}, disk));
		for await (const event of run.run()) {
			if (event.type === "step") last = event.step;
			if (last === 5) break;
		}
		expect(recordOf(place.out)).toMatchObject({ state: "stopped", end: null });
		await trainer(place, { ...options, resume_from_checkpoint: "latest" }, fakeNative({}, disk)).train();
		const record = recordOf(place.out);
		expect(record.parts.map(({ firstStep }) => firstStep)).toEqual([0, 4]);
		expect(record.saves.map(({ step }) => step)).toEqual([8]);
		expect(record.figures).toEqual(readerOf(place.out).figures);
	});

	it("that fails records its error", async () => {
		const place = workspace(folder);
		const faults: Faults = { onStep: (step) => (step === 4 ? Number.NaN : undefined) };
		const error = await errorOf(trainer(place, SAVING, fakeNative(faults)).train());
		const record = recordOf(place.out);
		expect(record).toMatchObject({ state: "failed", error: { code: "ARL_NONFINITE", message: error.message } });
		expect(readFileSync(join(place.out, "report.html"), "utf8")).toContain("ARL_NONFINITE");
	});

	it("whose process is gone has died", async () => {
		const place = workspace(folder);
		await trainer(place).train();
		const record = recordOf(place.out);
		const running = { ...record, state: "running" as const };
		writeRecord(place.out, running);
		expect(readerOf(place.out).state).toBe("running");
		writeRecord(place.out, { ...running, process: { ...record.process, birth: "1" } });
		expect(readerOf(place.out).state).toBe("died");
		writeRecord(place.out, { ...running, process: { ...record.process, pid: 2 ** 22 + 1 } });
		expect(readerOf(place.out).state).toBe("died");
		writeRecord(place.out, { ...running, process: { ...record.process, host: "elsewhere", pid: 2 ** 22 + 1 } });
		expect(readerOf(place.out).state).toBe("running");
	});

	it("does not end where the report cannot be written, and warns once", async () => {
		const place = workspace(folder);
		mkdirSync(join(place.out, "report.html", "in the way"), { recursive: true });
		const all = await events(trainer(place, SAVING));
		const warnings = ofType(all, "notice").filter(({ message }) => message.startsWith("report.html cannot be written"));
		expect(warnings).toHaveLength(1);
		expect(all.at(-1)).toMatchObject({ type: "end", outcome: "completed" });
	});
});

describe("the files of a run", () => {
	const line = (step: number, loss: number) => `${JSON.stringify({ step, loss, elapsed_seconds: step })}\n`;

	it("are read on as they grow, whole lines only, and from the start after a resume", async () => {
		const place = workspace(folder);
		await trainer(place).train();
		const record = recordOf(place.out);
		const path = join(place.out, "metrics.jsonl");
		writeFileSync(path, line(1, 3) + line(2, 2) + line(3, 1).slice(0, 10));
		const reader = readerOf(place.out);
		expect(reader.training.extent("loss")?.last).toEqual({ step: 2, value: 2 });
		expect(reader.update()).toBe(false);
		appendFileSync(path, line(3, 1).slice(10));
		expect(reader.update()).toBe(true);
		expect(reader.training.extent("loss")).toMatchObject({ count: 3, last: { step: 3, value: 1 } });
		// Cut to step 1, and longer again by the next look.
		writeFileSync(path, line(1, 3) + line(2, 9) + line(3, 8) + line(4, 7));
		writeRecord(place.out, { ...record, id: "resumed" });
		reader.update();
		expect(reader.training.extent("loss")).toMatchObject({
			count: 4,
			lowest: { value: 3 },
			last: { step: 4, value: 7 },
		});
	});

	it("hold evaluations and samples next to training", async () => {
		const out = join(folder, "evaluated");
		mkdirSync(out);
		const evaluation = JSON.stringify({ step: 2, epoch: 1, eval_loss: 1.5, eval_web_loss: 2, eval_runtime: 9 });
		const sample = JSON.stringify({ event: "sample", step: 2, location: "e:1", message: 0, reply: "x", loss: 7 });
		writeFileSync(join(out, "metrics.jsonl"), `${line(1, 3)}${line(2, 2)}${evaluation}\n${sample}\nnot json\n`);
		const reader = readerOf(out);
		expect(reader.training.extent("loss")?.count).toBe(2);
		expect(Object.keys(reader.figures?.evaluation ?? {})).toEqual(["eval_loss", "eval_web_loss"]);
		expect(reader.samples.within(1e4).rows).toHaveLength(1);
		expect(reader.state).toBe("unknown");
	});

	it("name the folder of the result where it is now", async () => {
		const place = workspace(folder);
		await trainer(place, SAVING).train();
		const record = recordOf(place.out);
		expect(resultFolder(record, "/moved")).toBe("/moved");
		expect(resultFolder({ ...record, end: null }, "/moved")).toBe(join("/moved", "checkpoint-8"));
		expect(resultFolder({ ...record, end: null, saves: [] }, "/moved")).toBe(null);
		expect(shellWord("it's here")).toBe(`'it'\\''s here'`);
	});
});

describe("commands on runs", () => {
	const output = capturedOutput();
	const parent = join(folder, "several");
	mkdirSync(parent);
	const made = Promise.all(
		[1e-3, 1e-4].map(async (learning_rate) => {
			const place = workspace(parent);
			await trainer(place, { learning_rate }).train();
			return place.out;
		}),
	);

	it("arl train ends with a sentence on each: what it reached, memory, waiting, the command that uses the result", async () => {
		const place = workspace(folder);
		const words = ["--model_name_or_path", place.model, "--train_file", place.file, "--output_dir", place.out];
		expect(await train([...words, "--logging_steps", "1"], () => fakeNative())).toBe(0);
		const ends = output.stderr.split("\n");
		expect(ends).toContainEqual(
			expect.stringMatching(/^reached {2}loss -?\d.*at step \d+.*from -?\d.*\. Token accuracy \d+\.\d %\.$/),
		);
		expect(ends).toContainEqual(expect.stringMatching(/^memory {3}.* planned; the whole process took at most .*iB\.$/));
		expect(ends).toContainEqual(
			expect.stringMatching(/^waiting {2}\d+\.\d % of the time \(.*\) went into waiting for rows\./),
		);
		expect(ends).toContain(`use it   npx arl chat ${place.out}`);
		expect(ends).toContain(`report   ${join(place.out, "report.html")}`);
	});

	it("the command that uses an adapter names its model too", () => {
		const option = (name: string, value: unknown) => ({ name, value, isDefault: false });
		const of = (...options: ReturnType<typeof option>[]) => baseOf({ options } as RunRecord);
		const model = option("model_name_or_path", "my base");
		expect(chatCommand("out", of(model, option("use_peft", true)))).toBe("npx arl chat 'my base' --adapter out");
		expect(of(model, option("use_peft", false), option("adapter_name_or_path", "old"))).toBe("my base");
		expect(chatCommand("out", of(model, option("use_peft", false)))).toBe("npx arl chat out");
	});

	it("ls lists those below a folder", async () => {
		const outs = await made;
		expect(await ls([parent])).toBe(0);
		for (const out of outs) expect(output.stdout).toContain(`${out}  completed    8/8`);
		output.stdout = "";
		expect(await ls(["--json", parent])).toBe(0);
		const found = JSON.parse(output.stdout) as { folder: string; state: string }[];
		expect(found.map(({ folder: one }) => one).sort()).toEqual([...outs].sort());
		expect((await errorOf(ls([join(parent, "none")]))).code).toBe("ARL_USAGE");
	});

	it("show shows one", async () => {
		const [out = ""] = await made;
		expect(await show([out])).toBe(0);
		expect(output.stdout).toContain(`${out}: completed`);
		expect(output.stdout).toMatch(/^ {2}learning_rate +0\.001$/m);
		expect(output.stdout).toMatch(/^reached +loss /m);
		expect((await errorOf(show([parent]))).message).toContain("is not the output_dir of a run");
	});

	it("diff names the options that differ, and what each reached", async () => {
		const outs = await made;
		expect(await diff(outs)).toBe(0);
		expect(output.stdout).toMatch(/^ {2}learning_rate +0\.001 +0\.0001$/m);
		expect(output.stdout).toMatch(/^ {2}loss +\d\S+ +\d\S+$/m);
		expect(output.stdout).not.toMatch(/^ {2}(output_dir|adam_beta1)/m);
	});

	it("watch ends with the run, with 1 where it has died", async () => {
		const [out = ""] = await made;
		expect(await watch([out])).toBe(0);
		expect(output.stdout).toMatch(/^step 8\/8 {2}loss \d/m);
		const record = recordOf(out);
		writeRecord(out, { ...record, state: "running", end: null, process: { ...record.process, birth: "1" } });
		expect(await watch([out])).toBe(1);
		writeRecord(out, record);
	});

	it("watch follows a run in progress", async () => {
		const place = workspace(folder);
		const run = trainer(place, SAVING, fakeNative({ stepMs: 30 })).run();
		for await (const event of run) if (event.type === "log") break;
		const record = recordOf(place.out);
		writeRecord(place.out, { ...record, state: "running" });
		const watching = watch([place.out, "--every", "0.01"]);
		appendFileSync(join(place.out, "metrics.jsonl"), line(2, 0.25));
		await expect.poll(() => output.stdout).toContain("loss 0.2500");
		writeRecord(place.out, { ...record, state: "completed" });
		expect(await watching).toBe(0);
	});

	const line = (step: number, loss: number) => `${JSON.stringify({ step, loss, elapsed_seconds: step })}\n`;

	it("watch fits a narrow terminal, and draws curves", async () => {
		const [out = ""] = await made;
		for (const text of watchLines(readerOf(out), 40)) expect(text.length).toBeLessThanOrEqual(40);
		expect(sparkline([0, 1, null, 7])).toBe("▁▂ █");
	});
});
