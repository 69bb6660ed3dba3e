import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { ArlError } from "../src/errors.js";
import type { EventOf, TrainEvent } from "../src/events.js";
import { bytes, count, duration, measure, rate } from "../src/report/format.js";
import { JsonReporter, MetricsFile, TextReporter } from "../src/report/index.js";
import { fitParts, LiveLine } from "../src/report/live.js";
import { stepParts } from "../src/report/reporter.js";
import { escapeControls, modelText } from "../src/report/terminal.js";

const folder = mkdtempSync(join(tmpdir(), "arl-report-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const ESCAPE = String.fromCharCode(27);

/** A terminal that keeps what is written and shows what a screen would: rows that wrap, one cursor, erasure. */
class Screen {
	text = "";
	constructor(public columns = 80) {}
	write(text: string): void {
		this.text += text;
	}
	get lines(): string[] {
		const rows: string[] = [""];
		let row = 0;
		let column = 0;
		for (const [token] of this.text.matchAll(new RegExp(`${ESCAPE}\\[\\d*[A-Za-z]|[\\s\\S]`, "g"))) {
			const command = token.startsWith(`${ESCAPE}[`) ? token.slice(2) : "";
			if (command.endsWith("A")) row = Math.max(0, row - Number(command.slice(0, -1) || 1));
			else if (command === "J") {
				rows[row] = (rows[row] ?? "").slice(0, column);
				rows.length = row + 1;
			} else if (command !== "") throw new Error(`unknown control sequence ${command}`);
			else if (token === "\r") column = 0;
			else if (token === "\n") {
				row++;
				column = 0;
				rows[row] ??= "";
			} else {
				if (column >= this.columns) {
					row++;
					column = 0;
				}
				rows[row] = (rows[row] ?? "").slice(0, column).padEnd(column) + token + (rows[row] ?? "").slice(column + 1);
				column++;
			}
		}
		return rows;
	}
}

const step: EventOf<"step"> = {
	type: "step",
	step: 12,
	totalSteps: 480,
	epoch: 0.025,
	loss: 1.23456,
	gradNorm: 0.98,
	learningRate: 2e-5,
	tokens: 2048,
	targetTokens: 900,
	numTokens: 24576,
	flops: 4e10,
	seconds: 0.5,
	dataSeconds: 0.01,
	rssBytes: 312 * 2 ** 20,
	secondsLeft: 234,
};

const log: EventOf<"log"> = {
	type: "log",
	metrics: {
		step: 12,
		epoch: 0.025,
		loss: 1.23456,
		grad_norm: 0.98,
		learning_rate: 2e-5,
		mean_token_accuracy: 0.451,
		entropy: 2.2,
		num_tokens: 24576,
		num_target_tokens: 9000,
		tokens_per_second: 4096,
		target_tokens_per_second: 1800,
		gflops: 80,
		step_seconds: 0.5,
		data_seconds: 0.01,
		rss_bytes: 312e6,
		elapsed_seconds: 6,
	},
};

const end: EventOf<"end"> = {
	type: "end",
	outcome: "completed",
	steps: 480,
	totalSteps: 480,
	epoch: 1,
	trainLoss: 0.5,
	seconds: 240,
	numTokens: 983_040,
	modelPath: "out/checkpoint-480",
	outputDir: "out",
};

describe("numbers", () => {
	it("are short and change unit without a jump", () => {
		expect([0, 1.5, 812, 999, 1000, 12_345, 999_499, 999_500, 1.2e6, 3e9].map(count)).toEqual([
			"0",
			"1.5",
			"812",
			"999",
			"1.00k",
			"12.3k",
			"999k",
			"1.00M",
			"1.20M",
			"3.00G",
		]);
		expect([0, 1023, 1024, 312 * 2 ** 20, 1.2 * 2 ** 30, 23.4 * 2 ** 30].map(bytes)).toEqual([
			"0 B",
			"1023 B",
			"1.00 KiB",
			"312 MiB",
			"1.20 GiB",
			"23.4 GiB",
		]);
		expect([0.42, 5, 9.99, 59.4, 59.6, 185, 7620, 273_600, Number.NaN].map(duration)).toEqual([
			"0.42s",
			"5.0s",
			"10.0s",
			"59s",
			"1m00s",
			"3m05s",
			"2h07m",
			"3d04h",
			"?",
		]);
		expect([0, 1.23456, 0.00001, 123.456, 1e6, Number.NaN].map(measure)).toEqual([
			"0.0000",
			"1.2346",
			"1.000e-5",
			"123.46",
			"1.000e+6",
			"NaN",
		]);
		expect([0, 2e-5].map(rate)).toEqual(["0", "2.00e-5"]);
	});
});

describe("a model's text", () => {
	const bell = "a\tb\n\u001b[2J\u0007\u009b1m\u007fé";

	it("has no control characters on a terminal, C1 among them, but for tabs and line breaks", () => {
		expect(modelText(bell, { isTTY: true })).toBe("a\tb\n\\u001b[2J\\u0007\\u009b1m\\u007fé");
		expect(escapeControls("a\tb\r\nc")).toBe("a\\tb\\r\nc");
	});

	it("stays as it is where a program reads it", () => {
		expect(modelText(bell, {})).toBe(bell);
	});
});

describe("the live line", () => {
	it("never fills a row, whatever the width, and keeps step and loss longest", () => {
		for (let width = 10; width <= 160; width++) {
			const line = fitParts(stepParts(step, 4096), width - 1);
			expect(line.length).toBeLessThan(width);
			if (width >= 29) expect(line).toMatch(/^step 12\/480 .*loss 1\.2346/);
		}
		expect(fitParts(stepParts(step, 4096), 200)).toBe(
			"step 12/480  [                ]  loss 1.2346  lr 2.00e-5  grad norm 0.9800  4.10k tokens/s  80 GFLOP/s  312 MiB  3m54s left",
		);
	});

	it("is drawn in place, below permanent lines, and leaves nothing behind", () => {
		const screen = new Screen(60);
		let now = 0;
		const reporter = new TextReporter({ stream: screen, live: true, color: false, now: () => now });
		reporter.event(step);
		now += 1000;
		reporter.event({ ...step, step: 13 });
		expect(screen.lines).toHaveLength(1);
		expect(screen.lines[0]).toMatch(/^step 13\/480 /);
		reporter.event(log);
		expect(screen.lines[0]).toMatch(/^step 12 {2}epoch 0\.03/);
		expect(screen.lines.at(-1)).toMatch(/^step 13\/480 /);
		reporter.event(end);
		reporter.close();
		expect(screen.lines.some((line) => line.startsWith("step 13/480"))).toBe(false);
		expect(screen.lines.join("\n")).toContain("metrics  out/metrics.jsonl");
	});

	it("is taken away whole where the terminal has wrapped it after it was made narrower", () => {
		const screen = new Screen(100);
		const live = new LiveLine(screen, () => 0);
		live.show([{ text: "x".repeat(90), keep: 0 }]);
		screen.columns = 40;
		live.clear();
		expect(screen.lines).toEqual([""]);
	});

	it("is drawn ten times a second at most", () => {
		const screen = new Screen();
		let now = 0;
		const live = new LiveLine(screen, () => now);
		for (now = 0; now < 1000; now += 10) live.show([{ text: `at ${now}`, keep: 0 }]);
		expect(screen.text.match(/at /g)).toHaveLength(10);
	});
});

describe("plain lines", () => {
	it("hold no control characters and one line a log", () => {
		const screen = new Screen();
		const reporter = new TextReporter({ stream: screen, live: false, color: false });
		for (const event of [step, log, end]) reporter.event(event);
		expect([...screen.text].filter((character) => character < " " && character !== "\n")).toEqual([]);
		expect(screen.text.split("\n")[0]).toBe(
			"step 12  epoch 0.03  loss 1.2346  grad_norm 0.9800  lr 2.00e-5  accuracy 45.1 %  4.10k tokens/s",
		);
		expect(screen.text).toContain("done: step 480 of 480 in 4m00s, 983k tokens, mean loss 0.5000");
		expect(screen.text).toContain("model    out/checkpoint-480");
	});

	it("name every row that was left out; above a live line the first ones, and a count of the rest", () => {
		const rows = Array.from({ length: 25 }, (_, i) => ({
			location: `rows.jsonl:${i}`,
			reason: "not json",
			message: "no",
		}));
		const shown = (live: boolean) => {
			const screen = new Screen();
			const reporter = new TextReporter({ stream: screen, live, color: false });
			reporter.event({ type: "rows_skipped", reasons: { "not json": 25 }, rows });
			return screen.text;
		};
		expect(shown(false)).toContain("left out 25 rows that cannot be used (not json: 25)");
		expect(shown(false)).toContain("rows.jsonl:24: no");
		expect(shown(true)).toContain("rows.jsonl:19: no");
		expect(shown(true)).not.toContain("rows.jsonl:20: no");
		expect(shown(true)).toContain("and 5 more");
	});
});

describe("--json", () => {
	it("prints every event as one line, numbers that are not finite as strings, and errors on both streams", () => {
		const out = new Screen();
		const people = new Screen();
		const reporter = new JsonReporter(out, new TextReporter({ stream: people, live: false, color: false }));
		const events: TrainEvent[] = [step, { ...step, gradNorm: Number.NaN }, log, end];
		for (const event of events) reporter.event(event);
		reporter.error(new ArlError("ARL_NONFINITE", "loss is NaN", "Lower learning_rate."));
		const lines = out.text
			.trimEnd()
			.split("\n")
			.map((line) => JSON.parse(line) as Record<string, unknown>);
		expect(lines.map(({ type }) => type)).toEqual(["step", "step", "log", "end", "error"]);
		expect(lines[1]?.gradNorm).toBe("NaN");
		expect(lines[4]).toMatchObject({ code: "ARL_NONFINITE", exitCode: 5, hint: "Lower learning_rate." });
		expect(people.text).toContain("ARL_NONFINITE loss is NaN");
	});
});

describe("metrics.jsonl", () => {
	const path = join(folder, "metrics.jsonl");
	const read = () => readFileSync(path, "utf8");

	it("has each line on disk as soon as it is written, and starts empty", () => {
		writeFileSync(path, "old\n");
		const file = MetricsFile.open(path);
		file.write({ step: 1, loss: 2 });
		expect(read()).toBe('{"step":1,"loss":2}\n');
		file.write({ step: 2, loss: Number.POSITIVE_INFINITY });
		file.close();
		expect(read()).toBe('{"step":1,"loss":2}\n{"step":2,"loss":"Infinity"}\n');
	});

	it("is cut back to the resumed step, unfinished and damaged lines included", () => {
		writeFileSync(path, '{"step":1}\n{"step":2}\n{"step":3}\n{"st');
		const file = MetricsFile.open(path, { step: 2 });
		file.write({ step: 3, again: true });
		file.close();
		expect(read()).toBe('{"step":1}\n{"step":2}\n{"step":3,"again":true}\n');
		writeFileSync(path, '{"step":1}\n{"step":2}');
		MetricsFile.open(path, { step: 5 }).close();
		expect(read()).toBe('{"step":1}\n');
	});

	it("loses an evaluation that is made again, and keeps one that is not", () => {
		const lines = ['{"step":2,"loss":1}', '{"step":2,"eval_loss":3}', '{"event":"sample","step":2,"reply":"a"}'];
		const all = lines.map((line) => `${line}\n`).join("");
		writeFileSync(path, all);
		MetricsFile.open(path, { step: 2 }).close();
		expect(read()).toBe(all);
		MetricsFile.open(path, { step: 2, evaluates: true }).close();
		expect(read()).toBe(`${lines[0]}\n`);
	});

	it("can be gone on with where it does not exist yet", () => {
		rmSync(path);
		const file = MetricsFile.open(path, { step: 4 });
		file.write({ step: 5 });
		file.close();
		expect(read()).toBe('{"step":5}\n');
	});

	it("refuses a folder that is not there", () => {
		expect(() => MetricsFile.open(join(folder, "none", "metrics.jsonl"))).toThrow(ArlError);
	});
});
