/** What TensorBoard's own reader, a real MLflow server and a real trackio server have of a run. */
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { afterEach, describe, expect, it, vi } from "vitest";
import type { TrainEvent } from "../src/events.js";
import { fakeNative } from "./support/fake-native.js";
import { temporaryFolder } from "./support/folder.js";
import { metricsOf } from "./support/real.js";
import { events, ofType, trainer, workspace } from "./support/run.js";
import { runPython } from "./support/tables.js";
import { pythonWith, startTracker, type Tracker } from "./support/trackers.js";

const folder = temporaryFolder();
const tensorboard = pythonWith("tensorboard", "event files in TensorBoard's reader");
const mlflow = pythonWith("mlflow", "a run on an MLflow server");
const trackio = pythonWith("trackio", "a run on a trackio server");
const SAVING = { save_strategy: "steps", save_steps: 2 } as const;
/** Steps are slow enough for a server to be killed and started meanwhile. */
const STEPS = 120;

let tracker: Tracker | null = null;
afterEach(async () => {
	vi.unstubAllEnvs();
	await tracker?.kill();
	tracker = null;
});

async function freePort(): Promise<number> {
	const server = createServer();
	await new Promise<void>((done) => void server.listen(0, "127.0.0.1", done));
	const { port } = server.address() as AddressInfo;
	await new Promise((done) => server.close(done));
	return port;
}

const isLate = (all: TrainEvent[]) => ofType(all, "notice").some(({ message }) => message.includes("not all is sent"));

/** The values of a metric by step, as the run wrote them. */
const written = (out: string, name: string) => metricsOf(out).map((line) => [line.step, line[name]]);

describe.skipIf(tensorboard === null)("TensorBoard", () => {
	const READ = `
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
events = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0}, purge_orphaned_data=True)
events.Reload()
scalars = {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}
text = str(tensor_util.make_ndarray(events.Tensors('configuration')[0].tensor_proto)[0], 'utf8')
print(json.dumps({'scalars': scalars, 'text': text}))
`;

	it("reads each scalar and the configuration, and after a resume each step once", async () => {
		const at = workspace(folder);
		const options = { ...SAVING, report_to: ["tensorboard" as const], learning_rate: 1e-4 };
		const disk = new Map();
		const run = trainer(at, options, fakeNative({}, disk)).run();
		for await (const event of run) if (event.type === "step" && event.step === 6) break;
		await trainer(at, { ...options, resume_from_checkpoint: "latest" }, fakeNative({}, disk)).train();
		const read = JSON.parse(runPython(tensorboard ?? "", READ, [join(at.out, "tensorboard")])) as {
			scalars: Record<string, [number, number][]>;
			text: string;
		};
		for (const name of ["loss", "learning_rate", "mean_token_accuracy", "num_tokens"]) {
			const wanted = written(at.out, name).map(([step, value]) => [step, Math.fround(value ?? 0)]);
			expect(read.scalars[`train/${name}`], name).toEqual(wanted);
		}
		expect(read.text).toContain("| learning_rate | 0.0001 |");
	});
});

describe.skipIf(mlflow === null)("MLflow", () => {
	it("has every line of a run whose server was killed and started again", { timeout: 600_000 }, async () => {
		const port = await freePort();
		const store = `sqlite:///${join(folder, "mlflow.db")}`;
		const words = ["-m", "mlflow", "server", "--port", String(port), "--workers", "1", "--backend-store-uri", store];
		const start = () =>
			startTracker(mlflow ?? "", words, {
				port,
				path: "/api/2.0/mlflow/experiments/get?experiment_id=0",
				env: { MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE: "true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION: "false" },
			});
		tracker = await start();
		vi.stubEnv("MLFLOW_TRACKING_URI", tracker.url);
		vi.stubEnv("MLFLOW_EXPERIMENT_NAME", "sinks");
		const at = workspace(folder);
		const options = {
			report_to: ["mlflow" as const],
			run_name: "killed",
			max_steps: STEPS,
			save_strategy: "epoch" as const,
			learning_rate: 1e-4,
		};
		const disk = new Map();
		let all: TrainEvent[] = [];
		for await (const event of trainer(at, options, fakeNative({ stepMs: 10 }, disk)).run()) {
			all.push(event);
			if (event.type === "step" && event.step === 40) await tracker.kill();
			if (event.type === "step" && event.step === STEPS) tracker = await start();
		}
		// A server that is slower than the patience at the end gets the rest when the run is resumed.
		for (let tries = 0; tries < 5 && isLate(all); tries++) {
			const again = { ...options, resume_from_checkpoint: "latest" };
			all = await events(trainer(at, again, fakeNative({}, disk)));
		}
		expect(isLate(all)).toBe(false);
		const call = async (path: string, body?: unknown) => {
			const sent = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
			const response = await fetch(`${tracker?.url}/api/2.0/mlflow/${path}`, {
				...sent,
				headers: { "content-type": "application/json" },
			});
			return (await response.json()) as Record<string, unknown>;
		};
		const { experiment } = (await call("experiments/get-by-name?experiment_name=sinks")) as {
			experiment: { experiment_id: string };
		};
		const { runs } = (await call("runs/search", { experiment_ids: [experiment.experiment_id] })) as {
			runs: {
				info: { run_id: string; status: string; run_name: string };
				data: { params: { key: string; value: string }[] };
			}[];
		};
		expect(runs).toHaveLength(1);
		expect(runs[0]?.info).toMatchObject({ status: "FINISHED", run_name: "killed" });
		expect(runs[0]?.data.params).toContainEqual({ key: "learning_rate", value: "0.0001" });
		const history = (await call(`metrics/get-history?run_id=${runs[0]?.info.run_id}&metric_key=train/loss`)) as {
			metrics: { step: number; value: number }[];
		};
		const byStep = new Map(history.metrics.map(({ step, value }) => [step, value]));
		expect([...byStep].sort(([a], [b]) => a - b)).toEqual(written(at.out, "loss"));
	});
});

describe.skipIf(trackio === null)("trackio", () => {
	it("has every line of a run once, whose server was killed and started again", { timeout: 600_000 }, async () => {
		const port = await freePort();
		const program = `import trackio; trackio.show(block_thread=True, open_browser=False, server_port=${port})`;
		const env = {
			TRACKIO_DIR: join(folder, "trackio"),
			TRACKIO_WRITE_TOKEN: "token",
			GRADIO_SERVER_PORT: String(port),
		};
		const start = () => startTracker(trackio ?? "", ["-c", program], { port, path: "/", env });
		tracker = await start();
		vi.stubEnv("TRACKIO_SERVER_URL", `${tracker.url}/?write_token=token`);
		const at = workspace(folder);
		const options = {
			report_to: ["trackio" as const],
			run_name: "killed",
			max_steps: STEPS,
			save_strategy: "epoch" as const,
		};
		const disk = new Map();
		let all: TrainEvent[] = [];
		for await (const event of trainer(at, options, fakeNative({ stepMs: 10 }, disk)).run()) {
			all.push(event);
			if (event.type === "step" && event.step === 40) await tracker.kill();
			if (event.type === "step" && event.step === STEPS) tracker = await start();
		}
		// A server that is slower than the patience at the end gets the rest when the run is resumed.
		for (let tries = 0; tries < 5 && isLate(all); tries++) {
			const again = { ...options, resume_from_checkpoint: "latest" };
			all = await events(trainer(at, again, fakeNative({}, disk)));
		}
		expect(isLate(all)).toBe(false);
		const call = async (name: string, body: unknown) => {
			const response = await fetch(`${tracker?.url}/api/${name}`, {
				method: "POST",
				body: JSON.stringify(body),
				headers: { "content-type": "application/json", "x-trackio-write-token": "token" },
			});
			return ((await response.json()) as { data: unknown }).data;
		};
		const logs = (await call("get_logs", { project: "arl", run: "killed" })) as {
			step: number;
			"train/loss": number;
		}[];
		expect(logs.map((line) => [line.step, line["train/loss"]])).toEqual(written(at.out, "loss"));
	});
});
