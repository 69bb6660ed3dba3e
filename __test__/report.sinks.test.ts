/** Sinks that take what a run reports: queued on disk, sent again, and never in the run's way. */
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer, type IncomingMessage, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { afterEach, describe, expect, it, vi } from "vitest";
import { run as send } from "../src/cli/runs-send.js";
import { resolveConfig } from "../src/config/index.js";
import { crc32c } from "../src/report/sinks/event-file.js";
import { metricsOfLine, tagOf } from "../src/report/sinks/lines.js";
import { Outbox, type Sink } from "../src/report/sinks/outbox.js";
import { pageText, parseAddress } from "../src/report/sinks/prometheus.js";
import { Sinks } from "../src/report/sinks/sinks.js";
import { SpikeDetector } from "../src/report/sinks/webhook.js";
import { type Faults, fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { contents } from "./support/real.js";
import { events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const output = capturedOutput();
const servers: Server[] = [];
afterEach(() => {
	vi.unstubAllEnvs();
	for (const server of servers.splice(0)) {
		server.close();
		server.closeAllConnections();
	}
});

/** A server that keeps the bodies it gets, as JSON, and answers as `answer` says. */
async function serve(answer: (request: IncomingMessage, body: unknown) => number | "never" = () => 200, port = 0) {
	const bodies: unknown[] = [];
	const server = createServer((request, response) => {
		let text = "";
		request.on("data", (chunk) => {
			text += chunk;
		});
		request.on("end", () => {
			const body = (text === "" ? null : JSON.parse(text)) as unknown;
			const status = answer(request, body);
			if (status === "never") return;
			if (status === 200) bodies.push(body);
			response.writeHead(status).end(status === 200 ? "{}" : `no ${request.url}`);
		});
	});
	servers.push(server);
	await new Promise<void>((done) => void server.listen(port, "127.0.0.1", done));
	return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, bodies };
}

/** A sink that takes lines, after so many failures. */
function recording(failures = 0): Sink & { lines: string[]; ends: string[] } {
	const lines: string[] = [];
	const ends: string[] = [];
	let left = failures;
	return {
		name: "test",
		source: "metrics.jsonl",
		lines,
		ends,
		async send(batch) {
			if (left-- > 0) throw new Error("not now");
			lines.push(...batch);
		},
		async finish(outcome) {
			ends.push(outcome);
		},
	};
}

function place(name: string, lines: number): string {
	const out = join(folder, name);
	mkdirSync(out);
	writeFileSync(join(out, "metrics.jsonl"), Array.from({ length: lines }, (_, i) => `{"step":${i + 1}}\n`).join(""));
	return out;
}

describe("an outbox", () => {
	it("sends each whole line once, in order, and the end after them", async () => {
		const out = place("whole", 50_000);
		const sink = recording();
		const outbox = new Outbox(sink, out);
		outbox.begin(true);
		expect(await outbox.finish("completed", 5000)).toBe(true);
		expect(sink.lines).toHaveLength(50_000);
		expect(sink.lines.map((line) => JSON.parse(line).step)).toEqual(Array.from({ length: 50_000 }, (_, i) => i + 1));
		expect(sink.ends).toEqual(["completed"]);
	});

	it("sends lines of any length", async () => {
		const out = place("long lines", 0);
		const lines = [10, 100_000, 32_767, 32_768, 5].map((length) => "x".repeat(length));
		writeFileSync(join(out, "metrics.jsonl"), `${lines.join("\n")}\n`);
		const sink = recording();
		const outbox = new Outbox(sink, out);
		outbox.begin(true);
		expect(await outbox.finish("completed", 5000)).toBe(true);
		expect(sink.lines.map(({ length }) => length)).toEqual(lines.map(({ length }) => length));
	});

	it("sends again what failed", async () => {
		const sink = recording(3);
		const outbox = new Outbox(sink, place("again", 3));
		outbox.begin(true);
		expect(await outbox.finish("completed", 10_000)).toBe(true);
		expect(sink.lines).toHaveLength(3);
	});

	it("gives up at the end of its time, and another process continues", async () => {
		const out = place("late", 3);
		const never = recording(1e9);
		const outbox = new Outbox(never, out);
		outbox.begin(true);
		const started = performance.now();
		expect(await outbox.finish("completed", 400)).toBe(false);
		expect(performance.now() - started).toBeLessThan(3000);
		expect(outbox.problem).toBe("not now");
		const sink = recording();
		const next = new Outbox(sink, out);
		next.begin(false);
		expect(await next.finish("completed", 5000)).toBe(true);
		expect(sink.lines).toHaveLength(3);
	});

	it("does not send what is sent to a run that is resumed, but what it writes again", async () => {
		const out = place("resumed", 5);
		const first = new Outbox(recording(), out);
		first.begin(true);
		await first.finish("stopped", 5000);
		writeFileSync(join(out, "metrics.jsonl"), '{"step":1}\n{"step":2}\n');
		const sink = recording();
		const second = new Outbox(sink, out);
		second.begin(false);
		second.cut(22);
		writeFileSync(join(out, "metrics.jsonl"), '{"step":1}\n{"step":2}\n{"step":3,"again":1}\n');
		expect(await second.finish("completed", 5000)).toBe(true);
		expect(sink.lines).toEqual(['{"step":3,"again":1}']);
	});
});

describe("lines", () => {
	it("become numbers under transformers' names; samples and what is no JSON are left out", () => {
		expect(metricsOfLine('{"step":3,"loss":0.5,"grad_norm":"NaN","run_name":"x"}')).toEqual({
			step: 3,
			values: [["loss", 0.5]],
		});
		expect(metricsOfLine('{"event":"sample","step":3,"reply":"x"}')).toBe(null);
		expect(metricsOfLine("{")).toBe(null);
		expect([tagOf("loss"), tagOf("eval_web_loss")]).toEqual(["train/loss", "eval/web_loss"]);
	});

	it("have the checksum of RFC 3720, B.4", () => {
		expect(crc32c(new Uint8Array(32))).toBe(0x8a9136aa);
		expect(crc32c(new Uint8Array(32).fill(255))).toBe(0x62a8ab43);
		expect(crc32c(Uint8Array.from({ length: 32 }, (_, i) => i))).toBe(0x46dd794e);
	});
});

const SAVING = { save_strategy: "steps", save_steps: 2 } as const;

/** A run that logs each step to sinks; its events. */
async function run(options: Options, faults: Faults = {}) {
	const at = workspace(folder);
	const all = await events(trainer(at, { ...SAVING, ...options }, fakeNative(faults)));
	return { ...at, all };
}

describe("report_to", () => {
	it("takes several sinks, and refuses what none of them is, with the reason", async () => {
		const refused = (report_to: string | string[], more = {}) =>
			errorOf(() =>
				resolveConfig([
					{ origin: "code", values: Object.entries({ output_dir: "o", model_name_or_path: "m", report_to, ...more }) },
				]),
			);
		expect((await refused("wandb")).message).toContain(
			"report_to wandb (in code) is known and not built: Weights & Biases reads",
		);
		expect((await refused(["tensorboard", "nonsense"])).message).toContain("expected one or several of tensorboard");
		expect((await refused("webhook")).message).toBe("report_to webhook needs webhook_url");
		expect((await refused("webhook", { webhook_url: "ftp://secret" })).message).toBe(
			"webhook_url: its value is no http or https address",
		);
		const at = workspace(folder);
		const error = await errorOf(trainer(at, { report_to: ["mlflow"] }).train());
		expect(error).toMatchObject({ code: "ARL_CONFIG" });
		expect(error.message).toContain("MLFLOW_TRACKING_URI");
		expect((await errorOf(trainer(at, { report_to: ["trackio"] }).train())).message).toContain("TRACKIO_SERVER_URL");
	});

	it("changes no number of the run, whether its services answer, refuse or hang", async () => {
		const plain = await run({});
		const hanging = await serve(() => "never");
		const refusing = await serve(() => 500);
		for (const { url } of [hanging, refusing]) {
			vi.stubEnv("MLFLOW_TRACKING_URI", url);
			vi.stubEnv("TRACKIO_SERVER_URL", `${url}?write_token=t`);
			const at = workspace(folder);
			const sinks = await Sinks.open({
				args: { ...trainer(at).args, report_to: ["mlflow", "trackio", "tensorboard"] },
				shown: [],
				patienceMilliseconds: 300,
			});
			const all = [];
			const started = performance.now();
			let warnings: string[] = [];
			for await (const event of trainer(at, SAVING).run()) {
				sinks.event(event);
				all.push(event);
				if (event.type === "end") warnings = (await sinks.finish("completed")).map(({ message }) => message);
			}
			expect(performance.now() - started).toBeLessThan(10_000);
			expect(numbers(all)).toEqual(numbers(plain.all));
			expect(warnings).toHaveLength(2);
			expect(warnings[0]).toMatch(/^report_to mlflow: not all is sent \(.*\); `npx arl runs send .*` sends the rest$/);
			sinks.close();
		}
	});
});

describe("what a service has missed", () => {
	it("is sent by `arl runs send`, once", { timeout: 60_000 }, async () => {
		let works = false;
		const { url, bodies } = await serve(() => (works ? 200 : 503));
		vi.stubEnv("TRACKIO_SERVER_URL", `${url}?write_token=t`);
		const at = workspace(folder);
		const options = { ...SAVING, report_to: ["trackio" as const] };
		const disk = new Map();
		const first = await events(trainer(at, options, fakeNative({}, disk)));
		expect(ofType(first, "notice").at(-1)?.message).toBe(
			`report_to trackio: not all is sent (${new URL(url).host} answers 503: no /api/bulk_log); \`npx arl runs send ${at.out}\` sends the rest`,
		);
		expect(first.at(-1)).toMatchObject({ type: "end", outcome: "completed" });
		expect(await send([at.out, "--seconds", "0.2"])).toBe(1);
		expect(output.stderr).toContain("report_to trackio: not all is sent");
		works = true;
		expect(await send([at.out])).toBe(0);
		expect(output.stdout).toBe("trackio: all is sent\n");
		const sent = () => (bodies as { logs: { step: number }[] }[]).flatMap(({ logs }) => logs.map(({ step }) => step));
		expect(sent()).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
		expect(await send([at.out])).toBe(0);
		await trainer(at, { ...options, resume_from_checkpoint: "latest" }, fakeNative({}, disk)).train();
		expect(sent()).toHaveLength(8);
	});
});

describe("the webhook", () => {
	it("gets the end of a run", async () => {
		const { url, bodies } = await serve();
		const { all } = await run({ report_to: ["webhook"], webhook_url: url, run_name: "mine" });
		expect(bodies).toMatchObject([{ event: "end", run: "mine", step: 8, detail: "completed" }]);
		expect((bodies[0] as { text: string }).text).toMatch(/^completed: step 8 of 8 in .*, mean loss /);
		expect(ofType(all, "notice").filter(({ level }) => level === "warning")).toEqual([]);
	});

	it("gets a failure, and a message again that was not taken", async () => {
		let tries = 0;
		const { url, bodies } = await serve(() => (++tries < 3 ? 503 : 200));
		const at = workspace(folder);
		const faults: Faults = { onStep: (step) => (step === 3 ? Number.NaN : undefined) };
		await errorOf(trainer(at, { report_to: ["webhook"], webhook_url: url }, fakeNative(faults)).train());
		expect(bodies).toMatchObject([{ event: "failure", step: 2, detail: "ARL_NONFINITE" }]);
	});

	it("gets a loss that spikes, once", async () => {
		const { url, bodies } = await serve();
		const onStep = (step: number) => (step === 70 || step === 71 ? 40 : 2 + (step % 3) / 10);
		await run({ report_to: ["webhook"], webhook_url: url, max_steps: 80, save_strategy: "no" }, { onStep });
		expect(bodies).toMatchObject([{ event: "spike", step: 70 }, { event: "end" }]);
		expect((bodies[0] as { text: string }).text).toMatch(
			/^the loss spiked to 40\.0000 at step 70, from a mean of 2\.1/,
		);
	});

	it("has its address in no file and no event", async () => {
		const { url } = await serve(() => 403);
		const secret = `${url.replace("http://", "http://user:hunter2@")}/services/T0KEN?key=hunter3`;
		vi.stubEnv("MLFLOW_TRACKING_URI", url.replace("http://", "http://user:hunter4@"));
		vi.stubEnv("TRACKIO_SERVER_URL", `${url}/?write_token=hunter5`);
		const at = workspace(folder);
		const options = { report_to: ["webhook" as const, "mlflow" as const, "trackio" as const], webhook_url: secret };
		const all = JSON.stringify(await events(trainer(at, options)));
		const found = [...contents(at.out)].filter(([, bytes]) => /hunter\d|T0KEN/.test(bytes.toString("latin1")));
		expect(found.map(([name]) => name)).toEqual([]);
		expect(all).not.toMatch(/hunter\d|T0KEN/);
		expect(all).toContain("report_to webhook: not all is sent (127.0.0.1");
	}, 60_000);

	it("takes no decline, noise or second spike for one", () => {
		const detector = new SpikeDetector();
		const take = (loss: number) => detector.take({ type: "log", metrics: { loss } } as never);
		for (let i = 0; i < 200; i++) expect(take(5 * Math.exp(-i / 50) + 0.1 * Math.sin(i))).toBe(null);
		expect(take(9)).toBeGreaterThan(0);
		expect(take(9)).toBe(null);
		expect(take(Number.NaN)).toBe(null);
	});
});

describe("the page for Prometheus", () => {
	it("has the latest values during the run, and ends with it", async () => {
		const port = await freePort();
		const at = workspace(folder);
		const options = { report_to: ["prometheus" as const], prometheus_address: `127.0.0.1:${port}`, run_name: 'a "b"' };
		const page = () => fetch(`http://127.0.0.1:${port}/metrics`);
		let text = "";
		for await (const event of trainer(at, options, fakeNative({ stepMs: 20 })).run()) {
			if (event.type === "step" && event.step === 4) text = await (await page()).text();
		}
		expect(text).toMatch(/^# TYPE arl_step gauge\narl_step\{run="a \\"b\\""\} [123]\n/m);
		expect(text).toMatch(/^arl_loss\{run="a \\"b\\""\} -?\d/m);
		for (const line of text.trim().split("\n"))
			expect(line).toMatch(/^(# TYPE \w+ gauge|\w+\{run=".*"\} -?[\d.e+-]+)$/);
		await expect(page()).rejects.toThrow();
	});

	it("refuses an address that it cannot have, before anything else is done", async () => {
		const { url } = await serve();
		const at = workspace(folder);
		const address = new URL(url).host;
		const error = await errorOf(trainer(at, { report_to: ["prometheus"], prometheus_address: address }).train());
		expect(error).toMatchObject({ code: "ARL_CONFIG" });
		expect(error.message).toContain(`prometheus_address ${address}: `);
		expect(parseAddress("[::1]:80")).toEqual({ host: "::1", port: 80 });
		expect(pageText("x\n", new Map([["eval_a-b_loss", 1]]))).toBe(
			'# TYPE arl_eval_a_b_loss gauge\narl_eval_a_b_loss{run="x\\n"} 1\n',
		);
	});
});

describe("TensorBoard's files", () => {
	it("are one for each part of the run, and the new run's alone after it replaces another", async () => {
		const at = workspace(folder);
		const options = { ...SAVING, report_to: ["tensorboard" as const] };
		const files = () => readdirSync(join(at.out, "tensorboard"));
		const disk = new Map();
		for await (const event of trainer(at, options, fakeNative({}, disk)).run())
			if (event.type === "step" && event.step === 5) break;
		await trainer(at, { ...options, resume_from_checkpoint: "latest" }, fakeNative({}, disk)).train();
		expect(
			files()
				.map((name) => name.split(".").at(-1))
				.sort(),
		).toEqual(["0", "4"]);
		await trainer(at, { ...options, overwrite_output_dir: true }).train();
		expect(files()).toHaveLength(1);
		const bytes = readFileSync(join(at.out, "tensorboard", files()[0] ?? ""));
		for (const tag of ["train/loss", "train/learning_rate", "configuration", "brain.Event:2"])
			expect(bytes.includes(tag)).toBe(true);
	});
});

async function freePort(): Promise<number> {
	const server = createServer();
	await new Promise<void>((done) => void server.listen(0, "127.0.0.1", done));
	const { port } = server.address() as AddressInfo;
	await new Promise((done) => server.close(done));
	return port;
}
