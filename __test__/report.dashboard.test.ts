/** The dashboard: its server, and its page in a real browser next to a run. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { appendFileSync, cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { networkInterfaces } from "node:os";
import { join } from "node:path";
import type { Browser } from "playwright-core";
import { afterAll, afterEach, describe, expect, it } from "vitest";
import { type Dashboard, openDashboard } from "../src/report/dashboard/server.js";
import { type RunRecord, readRecord, writeRecord } from "../src/report/runs/record.js";
import { openBrowser, openPage } from "./support/browser.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";
import { trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const browser: Browser | null = await openBrowser("report.dashboard.test.ts");
afterAll(() => browser?.close());

let dashboard: Dashboard | null = null;
async function open(folders: string[]): Promise<string> {
	dashboard = await openDashboard({ folders, port: 0, readMilliseconds: 20 });
	return dashboard.url;
}
afterEach(async () => {
	await dashboard?.close();
	dashboard = null;
});

async function finished(parent = folder, options = {}): Promise<string> {
	const place = workspace(parent);
	await trainer(place, { save_strategy: "steps", save_steps: 4, ...options }).train();
	return place.out;
}

describe("the dashboard's server", () => {
	it("answers requests with the token, and refuses all others", async () => {
		const url = new URL(await open([await finished()]));
		expect((await fetch(url)).status).toBe(200);
		for (const path of ["/", "/events", "/run/0"]) {
			for (const query of ["", "?token=", `?token=${"0".repeat(32)}`, `?token=${url.searchParams.get("token")}0`]) {
				const response = await fetch(new URL(`${path}${query}`, url.origin));
				expect(response.status, `${path}${query}`).toBe(403);
				expect(await response.text()).not.toContain("loss");
			}
		}
		expect((await fetch(new URL(`/run/0${url.search}`, url.origin))).status).toBe(404);
	});

	it("listens on the loopback address alone", async () => {
		const { port, hostname } = new URL(await open([folder]));
		expect(hostname).toBe("127.0.0.1");
		const others = Object.values(networkInterfaces()).flatMap((all) => (all ?? []).filter(({ internal }) => !internal));
		for (const { address } of others) {
			const refused = await new Promise<boolean>((done) => {
				const socket = connect({ host: address, port: Number(port) });
				socket.once("connect", () => done(false)).once("error", () => done(true));
			});
			expect(refused, address).toBe(true);
		}
	});

	it("reports a port that is taken", async () => {
		const { port } = new URL(await open([folder]));
		const error = await errorOf(openDashboard({ folders: [folder], port: Number(port) }));
		expect(error).toMatchObject({ code: "ARL_IO" });
		expect(error.message).toContain(port);
	});

	it("sends changes as events, and none where nothing changes", async () => {
		const out = await finished();
		const url = new URL(await open([out]));
		const abort = new AbortController();
		const response = await fetch(new URL(`/events${url.search}`, url.origin), { signal: abort.signal });
		expect(response.headers.get("content-type")).toContain("text/event-stream");
		let text = "";
		const reading = (async () => {
			for await (const chunk of response.body ?? []) text += Buffer.from(chunk).toString();
		})().catch(() => {});
		const pages = () => text.split("event: page").length - 1;
		await expect.poll(pages).toBe(1);
		appendFileSync(join(out, "metrics.jsonl"), '{"step":99,"loss":0.125,"elapsed_seconds":99}\n');
		await expect.poll(pages).toBe(2);
		expect(text).toContain('"last":{"step":99,"value":0.125}');
		await new Promise((done) => setTimeout(done, 200));
		expect(pages()).toBe(2);
		abort.abort();
		await reading;
	});

	it("is a command that prints the address, and ends with SIGINT", async () => {
		const out = await finished();
		const child = spawn(process.execPath, [join(root, "dist", "cli", "main.js"), "dashboard", out]);
		let stdout = "";
		let stderr = "";
		child.stderr.on("data", (chunk) => {
			stderr += chunk;
		});
		child.stdout.on("data", (chunk) => {
			stdout += chunk;
			child.kill("SIGINT");
		});
		const [code] = await once(child, "close");
		expect({ code, stderr }).toEqual({ code: 0, stderr: "1 run; Ctrl-C ends the dashboard\n" });
		expect(stdout).toMatch(/^http:\/\/127\.0\.0\.1:\d+\/\?token=[0-9a-f]{32}\n$/);
	});
});

describe.skipIf(browser === null)("the dashboard in a browser", () => {
	it("shows a run as it goes, survives a refresh, a run that dies and one that is resumed", async () => {
		const place = workspace(folder);
		const disk = new Map();
		const options = { save_strategy: "steps", save_steps: 2 } as const;
		const run = trainer(place, options, fakeNative({ stepMs: 40 }, disk)).run();
		for await (const event of run) if (event.type === "step" && event.step === 5) break;
		// A process that is killed after step 5.
		const child = spawn(process.execPath, ["--eval", "setTimeout(() => {}, 1e6)"]);
		const record = readRecord(place.out) as RunRecord;
		const birth = readFileSync(`/proc/${child.pid}/stat`, "utf8").split(") ")[1]?.split(" ")[19] ?? null;
		writeRecord(place.out, { ...record, state: "running", process: { ...record.process, pid: child.pid ?? 0, birth } });

		const { page, complaints } = await openPage(browser as Browser, await open([place.out]));
		const text = async () => (await page.textContent("main")) ?? "";
		expect(await text()).toContain("running");
		appendFileSync(join(place.out, "metrics.jsonl"), '{"step":6,"loss":0.0625,"elapsed_seconds":9}\n');
		await expect.poll(text).toContain("loss 0.0625 at step 6");
		await page.reload();
		await page.waitForSelector("html[data-ready]");
		expect(await text()).toContain("loss 0.0625 at step 6");

		child.kill("SIGKILL");
		await expect.poll(text).toContain("died: its process is gone");

		const resumed = trainer(place, { ...options, resume_from_checkpoint: "latest" }, fakeNative({ stepMs: 40 }, disk));
		const states = new Set<string>();
		for await (const _ of resumed.run()) states.add((await page.textContent(".badge")) ?? "");
		expect([...states]).toContain("running");
		await expect.poll(text).toContain("completed");
		await expect.poll(text).toContain("at step 8");
		expect(await text()).not.toContain("0.0625");
		expect(complaints).toEqual([]);
		await page.close();
	});

	it("compares twenty runs, and takes up one that starts later", async () => {
		const parent = join(folder, "twenty");
		const first = await finished(folder, { learning_rate: 1e-3, run_name: null });
		const record = readRecord(first) as RunRecord;
		for (let i = 0; i < 19; i++) {
			const out = join(parent, `run-${i}`);
			mkdirSync(out, { recursive: true });
			cpSync(join(first, "metrics.jsonl"), join(out, "metrics.jsonl"));
			const set = (name: string) => (name === "learning_rate" ? { value: 1e-3 * (i + 1) } : {});
			const changed = record.options.map((option) => ({ ...option, ...set(option.name) }));
			writeRecord(out, { ...record, options: changed });
		}
		const { page, complaints } = await openPage(browser as Browser, await open([parent]));
		const names = () => page.$$eval("tbody tr td:nth-child(2) a", (all) => all.map((one) => one.textContent));
		expect(await names()).toEqual(Array.from({ length: 19 }, (_, i) => `run-${i}`));
		expect(await page.textContent("main")).toContain("0.019");
		cpSync(join(parent, "run-3"), join(parent, "run-19"), { recursive: true });
		await expect.poll(async () => (await names()).length).toBe(20);
		expect(await page.$$eval(".key", (all) => all.length)).toBe(20);
		await page.selectOption("select", "grad_norm");
		expect(await page.textContent("h3")).toBe("grad_norm");
		await page.click("tbody tr:first-child input");
		await expect.poll(() => page.$$eval(".key", (all) => all.length)).toBe(19);
		await page.click("tbody tr td:nth-child(2) a");
		await page.waitForSelector('[data-chart="accuracy"]');
		await page.click("text=all runs");
		await page.waitForSelector('[data-chart="comparison"]');
		expect(complaints).toEqual([]);
		await page.close();
		rmSync(parent, { recursive: true });
	});

	it("says that the dashboard has ended, and keeps what it shows", async () => {
		const out = await finished();
		writeFileSync(join(out, "notes.txt"), "");
		const { page } = await openPage(browser as Browser, await open([out]));
		await dashboard?.close();
		await expect.poll(() => page.textContent("#connection")).toContain("no connection");
		expect(await page.textContent("main")).toContain("completed");
		await page.close();
	});
});
