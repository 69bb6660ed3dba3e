/** The page of a run in a real browser. */
import { closeSync, mkdirSync, openSync, readFileSync, statSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import type { Browser } from "playwright-core";
import { afterAll, describe, expect, it } from "vitest";
import { pageOf, scriptJson } from "../src/report/page/page.js";
import { RunReader } from "../src/report/runs/read-run.js";
import { type RunRecord, readRecord, writeRecord } from "../src/report/runs/record.js";
import { openBrowser, openPage } from "./support/browser.js";
import { temporaryFolder } from "./support/folder.js";
import { trainer, workspace } from "./support/run.js";

const MOST_BYTES = 250_000;
/** What a row may hold to break a page. */
const HOSTILE = "</script><img src=x onerror=alert(1)><!-- \u2028 & {{data}}";

const folder = temporaryFolder();
const browser: Browser | null = await openBrowser("report.page.test.ts");
afterAll(() => browser?.close());

async function finishedRun(): Promise<string> {
	const place = workspace(folder);
	await trainer(place, {
		save_strategy: "steps",
		save_steps: 2,
		learning_rate: 1e-4,
		run_name: "my <b>run</b>",
	}).train();
	return place.out;
}

/** A run with an evaluation by source and samples, as lines of its metrics; gives its folder. */
async function evaluatedRun(): Promise<string> {
	const out = await finishedRun();
	const lines = Array.from({ length: 40 }, (_, i) => [
		metricsLine(i + 1, 3 - i / 20),
		{
			step: i + 1,
			epoch: 1,
			eval_loss: 3.1 - i / 20,
			eval_mean_token_accuracy: 0.5,
			eval_web_loss: 2,
			eval_math_loss: 4,
			highest_losses: [{ location: `eval.jsonl:${100 + i}`, loss: 7.25, targets: 12 }],
		},
		{
			event: "trained_rows",
			step: i + 1,
			epoch: 1,
			first_step: 3,
			highest_losses: [{ location: `rows.jsonl:${200 + i}`, loss: 6.5, targets: 14 }],
		},
		{
			event: "sample",
			step: i + 1,
			epoch: 1,
			location: "eval.jsonl:7",
			message: 1,
			prompt: `user: ${HOSTILE}`,
			expected: "a < b",
			reply: i === 0 ? "the the the" : "a < b",
			right: i > 0,
		},
	]).flat();
	writeFileSync(join(out, "metrics.jsonl"), lines.map((line) => `${JSON.stringify(line)}\n`).join(""));
	return out;
}

function metricsLine(step: number, loss: number): Record<string, number> {
	return {
		step,
		epoch: step / 40,
		loss,
		grad_norm: 1,
		learning_rate: 1e-3,
		mean_token_accuracy: 0.5,
		entropy: 1,
		num_tokens: 100 * step,
		num_target_tokens: 50 * step,
		tokens_per_second: 1000,
		step_seconds: 1,
		data_seconds: 0.25,
		rss_bytes: 2e8,
		elapsed_seconds: step,
	};
}

function writePage(out: string): string {
	const reader = new RunReader(out);
	reader.update();
	const path = join(out, "page.html");
	writeFileSync(path, pageOf([reader]));
	return path;
}

describe("report.html", () => {
	it("is written at each checkpoint and at the end, and names no other file or address to load", async () => {
		const place = workspace(folder);
		const run = trainer(place, { save_strategy: "steps", save_steps: 4 });
		const pages: string[] = [];
		for await (const event of run.run()) {
			if (event.type === "saved" || event.type === "end")
				pages.push(readFileSync(join(place.out, "report.html"), "utf8"));
		}
		expect(pages).toHaveLength(3);
		const states = pages.map((page) => /"state":"(\w+)"/.exec(page)?.[1]);
		expect(states).toEqual(["running", "running", "completed"]);
		for (const page of pages) {
			expect(page).not.toMatch(/<(script|link|img)[^>]*(src|href)="(?!data:)/);
			expect(page).not.toMatch(/@import|url\(/);
			expect(page).not.toContain("{{");
		}
	});

	it("stays within its size, whatever the run holds", async () => {
		const out = await finishedRun();
		const record = readRecord(out) as RunRecord;
		const long = "語".repeat(3000);
		writeRecord(out, {
			...record,
			warnings: Array.from({ length: 50 }, (_, i) => `${i} ${long}`),
			options: record.options
				.map((option) => ({ ...option, value: Array(500).fill("rows/part-of-many.jsonl") }))
				.slice(0, 12),
		});
		const lines: string[] = [];
		for (let step = 1; step <= 2000; step++) {
			const noisy = Object.entries(metricsLine(step, 1)).map(([name, value]) => [
				name,
				value * (1 + Math.sin(step) / 3),
			]);
			lines.push(JSON.stringify({ ...Object.fromEntries(noisy), step, elapsed_seconds: step }));
			const evaluated = Array.from({ length: 60 }, (_, i) => [`eval_source${i}_loss`, 2 + Math.sin(step * i)]);
			lines.push(JSON.stringify({ step, ...Object.fromEntries(evaluated) }));
		}
		const highest_losses = Array(50).fill({ location: long, source: long, loss: 9, targets: 9 });
		lines.push(JSON.stringify({ step: 2000, eval_loss: 9, highest_losses }));
		for (let row = 0; row < 200; row++) {
			const texts = { prompt: long, expected: long, reply: long };
			lines.push(JSON.stringify({ event: "sample", step: 1, location: `e:${row}`, message: 1, ...texts }));
		}
		writeFileSync(join(out, "metrics.jsonl"), `${lines.join("\n")}\n`);
		expect(statSync(writePage(out)).size).toBeLessThan(MOST_BYTES);
	});

	it("puts data into the script that no text in them can leave", () => {
		const json = scriptJson({ text: HOSTILE });
		expect(json).not.toContain("<");
		expect(JSON.parse(json)).toEqual({ text: HOSTILE });
	});
});

describe.skipIf(browser === null)("the page of a run in a browser", () => {
	const open = async (path: string, options = {}) =>
		await openPage(browser as Browser, pathToFileURL(path).href, options);

	it.each(["light", "dark"])("shows the run, without complaint and without a network: %s", async (scheme) => {
		const path = writePage(await evaluatedRun());
		const { page, complaints, requests } = await open(path, { dark: scheme === "dark" });
		const text = await page.textContent("main");
		for (const part of [
			"my <b>run</b>",
			"completed",
			"loss 1.0500 at step 40",
			"25.0 % of the time",
			"Replies to held-out rows",
			"the the the",
			HOSTILE.replace("\u2028", "").slice(0, 30),
			"eval.jsonl:7",
			"Held-out rows of the highest loss, after step 40",
			"eval.jsonl:1397.250012",
			"Trained rows of the highest loss, steps 3 to 40",
			"rows.jsonl:2396.500014",
			"learning_rate",
			"0.0001",
			"npx arl chat",
			"vllm serve",
			"rows.jsonl",
		])
			expect(text).toContain(part);
		const charts = await page.$$eval("[data-chart]", (all) => all.map((one) => one.getAttribute("data-chart")));
		expect(charts).toEqual([
			"loss",
			"accuracy",
			"grad_norm",
			"learning_rate",
			"tokens_per_second",
			"waiting_share",
			"memory",
			"entropy",
			"eval_loss",
		]);
		const drawn = await page.$$eval("[data-chart] canvas", (all) =>
			(
				all as unknown as {
					width: number;
					height: number;
					getContext(kind: "2d"): { getImageData(...box: number[]): { data: Uint8Array } };
				}[]
			).map((canvas) =>
				canvas
					.getContext("2d")
					.getImageData(0, 0, canvas.width, canvas.height)
					.data.some((value) => value > 0),
			),
		);
		expect(drawn).toEqual(charts.map(() => true));
		const [ink, paper] = (await page.evaluate(
			"[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]",
		)) as [string, string];
		expect(contrast(ink, paper)).toBeGreaterThan(7);
		expect(complaints).toEqual([]);
		expect(requests).toEqual([pathToFileURL(path).href]);
		await page.close();
	});

	it("fits a narrow window, and redraws for what the user chooses", async () => {
		const { page, complaints } = await open(writePage(await evaluatedRun()), { width: 390 });
		expect(await page.evaluate("document.documentElement.scrollWidth")).toBeLessThanOrEqual(390);
		for (const box of await page.$$("input[type=checkbox]")) await box.click();
		await page.emulateMedia({ colorScheme: "dark" });
		await page.hover('[data-chart="loss"] .u-over');
		expect(await page.textContent('[data-chart="loss"]')).toMatch(/step \d+/);
		expect(complaints).toEqual([]);
		await page.close();
	});

	it("opens within a second for a run of 1,000,000 lines, and shows its one spike", { timeout: 180_000 }, async () => {
		const out = join(folder, "long");
		mkdirSync(out);
		const file = openSync(join(out, "metrics.jsonl"), "w");
		for (let from = 0; from < 1_000_000; from += 10_000) {
			let text = "";
			for (let step = from + 1; step <= from + 10_000; step++) {
				const loss = step === 654_321 ? 99 : 2 + 1 / step;
				text += `{"step":${step},"epoch":0.5,"loss":${loss},"grad_norm":1.5,"learning_rate":0.001,"mean_token_accuracy":0.5,"tokens_per_second":5000,"data_seconds":0.01,"rss_bytes":2e8,"elapsed_seconds":${step}}\n`;
			}
			writeSync(file, text);
		}
		closeSync(file);
		const path = writePage(out);
		expect(statSync(path).size).toBeLessThan(MOST_BYTES);
		const { page, complaints } = await open(path);
		const drawing = (await page.evaluate(
			"performance.timing.domComplete - performance.timing.navigationStart",
		)) as number;
		expect(drawing).toBeLessThan(1000);
		const high = (await page.evaluate(
			"Math.max(...JSON.parse(document.getElementById('data').textContent).runs[0].training.metrics.loss.high)",
		)) as number;
		expect(high).toBe(99);
		expect(await page.textContent("main")).toContain("1,000,000");
		expect(complaints).toEqual([]);
		await page.close();
	});
});

/** The contrast of two colours by WCAG 2.2: 21 for black on white. */
function contrast(a: string, b: string): number {
	const luminance = (color: string) => {
		const [red = 0, green = 0, blue = 0] = (color.match(/\d+(\.\d+)?/g) ?? []).map((part) => {
			const value = Number(part) / 255;
			return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
		});
		return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
	};
	const [low = 0, high = 0] = [luminance(a), luminance(b)].sort((x, y) => x - y);
	return (high + 0.05) / (low + 0.05);
}
