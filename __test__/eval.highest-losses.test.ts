/** The held-out rows of the highest loss: against the losses of rows evaluated each by itself, and by worked cases. */
import { appendFileSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { evaluate } from "../src/api/evaluate.js";
import { QwenTrainer } from "../src/api/trainer.js";
import { run } from "../src/cli/eval.js";
import type { MicroBatchStats } from "../src/native.js";
import { RunReader } from "../src/report/runs/read-run.js";
import { highestLosses } from "../src/run/eval/highest-losses.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { metricsOf, root, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

/** Rows of a source named `e`, from line 1, by mean loss and number of targets. */
function found(
	rows: ([loss: number, targets: number] | null)[],
	parts: { name: string; first: number; end: number }[] = [],
) {
	const byRow = rows.map((row) => {
		if (row === null) return undefined;
		const [loss, targets] = row;
		const sums = { lossSum: loss * targets, targetWeight: targets, targetTokens: targets };
		return sums as MicroBatchStats;
	});
	const source = { location: (row: number) => `e:${row + 1}` };
	return highestLosses(byRow, source, parts);
}

describe("the rows of the highest loss", () => {
	it("are at most ten, by mean loss a target, the first of equal ones first", () => {
		const rows = Array.from({ length: 30 }, (_, i): [number, number] => [(i * 7) % 15, 1 + i]);
		const expected = rows
			.map(([loss, targets], i) => ({ location: `e:${i + 1}`, loss, targets }))
			.sort((a, b) => b.loss - a.loss)
			.slice(0, 10);
		expect(found(rows)).toEqual(expected);
		expect(found(rows).map(({ loss }) => loss)).toEqual([14, 14, 13, 13, 12, 12, 11, 11, 10, 10]);
	});

	it("begin with those that are not a number, and leave out rows without a target and rows not evaluated", () => {
		const names = found([
			[1, 2],
			[Number.NaN, 1],
			null,
			[Number.POSITIVE_INFINITY, 1],
			[0, 0],
			[Number.NaN, 3],
			[3, 1],
		]);
		expect(names.map(({ location }) => location)).toEqual(["e:2", "e:6", "e:4", "e:7", "e:1"]);
	});

	it("name their source where there are several", () => {
		const parts = [
			{ name: "a", first: 0, end: 2 },
			{ name: "b", first: 2, end: 3 },
		];
		const rows: [number, number][] = [
			[1, 1],
			[2, 1],
			[3, 1],
		];
		expect(found(rows, parts).map(({ source }) => source)).toEqual(["b", "a", "a"]);
		expect(found(rows, parts.slice(0, 1)).every((row) => !("source" in row))).toBe(true);
	});
});

describe("an evaluation on the real core", () => {
	const output = capturedOutput();

	it("names them as each row by itself gives them, in metrics.jsonl, arl eval and what the page reads", async () => {
		const place = tinyPlace(folder, 24);
		const config = join(place.model, "config.json");
		// A saved model in a narrower type would not be quite the trained one.
		writeFileSync(config, JSON.stringify({ ...JSON.parse(readFileSync(config, "utf8")), dtype: "float32" }));
		const rows = readFileSync(join(root, "assets", "heldout.jsonl"), "utf8")
			.split("\n")
			.slice(0, 14);
		const all = join(folder, "all.jsonl");
		writeFileSync(all, `${rows.join("\n")}\n`);
		const files = rows.map((row, i) => {
			const file = join(folder, `one-${i + 1}.jsonl`);
			writeFileSync(file, `${row}\n`);
			return file;
		});
		const args = {
			model_name_or_path: place.model,
			train_file: place.file,
			output_dir: place.out,
			init_from_config: true,
			max_steps: 4,
			learning_rate: 1e-2,
			eval_file: all,
			eval_strategy: "steps" as const,
			eval_steps: 2,
			per_device_eval_batch_size: 4,
			bf16: false,
		};
		await new QwenTrainer({ args }).train();
		const base = { model_name_or_path: place.out, bf16: false };
		const sources = files.map((file, i) => `r${i + 1}=${file}`);
		const { figures, highestLosses: ofSources } = await evaluate({ ...base, eval_file: sources });
		const expected = rows
			.map((_, i) => ({ location: `${all}:${i + 1}`, loss: figures[`eval_r${i + 1}_loss`] ?? Number.NaN }))
			.sort((a, b) => b.loss - a.loss)
			.slice(0, 10);
		expect(new Set(expected.map(({ loss }) => loss)).size).toBeGreaterThan(5);

		const lines = metricsOf(place.out).filter((line) => "eval_loss" in line) as Record<string, unknown>[];
		const [early, last] = lines.map(
			(line) => line.highest_losses as { location: string; loss: number; targets: number }[],
		);
		expect(last?.map(({ location, loss }) => ({ location, loss }))).toEqual(expected);
		expect(early?.map(({ loss }) => loss)).not.toEqual(expected.map(({ loss }) => loss));
		expect(last?.every(({ targets }) => Number.isInteger(targets) && targets > 0)).toBe(true);
		expect(
			ofSources.map(({ source, loss, targets }) => ({ location: `${all}:${source?.slice(1)}`, loss, targets })),
		).toEqual(last);

		const words = ["--model_name_or_path", place.out, "--eval_file", all, "--bf16", "false", "--json"];
		expect(await run(words)).toBe(0);
		expect(JSON.parse(output.stdout).highest_losses).toEqual(last);

		const reader = new RunReader(place.out);
		reader.update();
		expect(reader.highestLosses).toEqual({
			step: 4,
			firstStep: null,
			rows: last?.map((row) => ({ ...row, source: null })),
		});
		const broken = [null, { location: 3, targets: 1 }, { location: "e:1", loss: "NaN", targets: 2 }];
		appendFileSync(
			join(place.out, "metrics.jsonl"),
			`${JSON.stringify({ step: 5, eval_loss: 1, highest_losses: broken })}\n`,
		);
		reader.update();
		expect(reader.highestLosses).toEqual({
			step: 5,
			firstStep: null,
			rows: [{ location: "e:1", source: null, loss: null, targets: 2 }],
		});
	}, 120_000);
});
