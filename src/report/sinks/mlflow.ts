/**
 * MLflow's tracking server, by its REST interface 2.0: one run of an experiment with the configuration as parameters. A resumed
 * run continues the same run. A line is one batch, or part of one; MLflow keeps both where a line is sent twice.
 */
import { ArlError } from "../../errors.js";
import { METRICS_FILE } from "../metrics.js";
import type { ShownOption } from "../runs/record.js";
import { HttpError, request, withoutLogin } from "./http.js";
import { metricsOfLine, tagOf } from "./lines.js";
import type { Memory, Sink } from "./outbox.js";

/** What the server takes in one request, and of one value. */
const MOST_METRICS = 1000;
const MOST_PARAMS = 100;
const MOST_CHARACTERS = 500;

/** How MLflow calls the ends of a run. */
const STATUS: Readonly<Record<string, string>> = {
	failed: "FAILED",
	died: "FAILED",
	interrupted: "KILLED",
	stopped: "KILLED",
};

/**
 * `env`: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, and `MLFLOW_TRACKING_TOKEN` or `MLFLOW_TRACKING_USERNAME` and
 * `MLFLOW_TRACKING_PASSWORD`, as MLflow's own clients take them.
 *
 * @throws ArlError `ARL_CONFIG` if there is no server's address.
 */
export function mlflowSink(name: string, options: readonly ShownOption[], env: NodeJS.ProcessEnv = process.env): Sink {
	const { url, headers } = serverOf(env);
	const experiment = env.MLFLOW_EXPERIMENT_NAME || "arl";
	const call = async (method: "GET" | "POST", path: string, signal: AbortSignal, body?: unknown) =>
		JSON.parse(await request({ method, url: `${url}/api/2.0/mlflow/${path}`, headers, body, signal })) as Answer;
	return {
		name: "mlflow",
		source: METRICS_FILE,
		async send(lines, memory, signal) {
			const run = await runOf(memory, signal);
			const timestamp = Date.now();
			const metrics = lines.flatMap((line) => {
				const found = metricsOfLine(line);
				if (found === null) return [];
				return found.values.map(([key, value]) => ({ key: tagOf(key), value, timestamp, step: found.step }));
			});
			for (let i = 0; i < metrics.length; i += MOST_METRICS) {
				await call("POST", "runs/log-batch", signal, { run_id: run, metrics: metrics.slice(i, i + MOST_METRICS) });
			}
		},
		async finish(outcome, memory, signal) {
			const run_id = await runOf(memory, signal);
			await call("POST", "runs/update", signal, {
				run_id,
				status: STATUS[outcome] ?? "FINISHED",
				end_time: Date.now(),
			});
		},
	};

	/** The id of the run on the server, which is created for the first line. */
	async function runOf(memory: Memory, signal: AbortSignal): Promise<string> {
		if (typeof memory.runId === "string") return memory.runId;
		const created = await call("POST", "runs/create", signal, {
			experiment_id: await experimentId(signal),
			run_name: name,
			start_time: Date.now(),
			tags: [{ key: "mlflow.source.name", value: "arl" }],
		});
		const id = created.run?.info.run_id ?? "";
		const params = options.map(({ name: key, value }) => ({ key, value: paramText(value) }));
		for (let i = 0; i < params.length; i += MOST_PARAMS) {
			await call("POST", "runs/log-batch", signal, { run_id: id, params: params.slice(i, i + MOST_PARAMS) });
		}
		memory.runId = id;
		return id;
	}

	async function experimentId(signal: AbortSignal): Promise<string> {
		const query = `experiments/get-by-name?experiment_name=${encodeURIComponent(experiment)}`;
		try {
			return (await call("GET", query, signal)).experiment?.experiment_id ?? "";
		} catch (error) {
			if (!(error instanceof HttpError && error.status === 404)) throw error;
			return (await call("POST", "experiments/create", signal, { name: experiment })).experiment_id ?? "";
		}
	}
}

/** What is read of the server's answers. */
interface Answer {
	experiment_id?: string;
	experiment?: { experiment_id: string };
	run?: { info: { run_id: string } };
}

function serverOf(env: NodeJS.ProcessEnv): ReturnType<typeof withoutLogin> {
	const address = env.MLFLOW_TRACKING_URI ?? "";
	if (!/^https?:\/\//.test(address)) {
		throw new ArlError(
			"ARL_CONFIG",
			"report_to mlflow: MLFLOW_TRACKING_URI is not the http address of a tracking server",
			"Set it, for example to http://127.0.0.1:5000, where `mlflow server` runs.",
		);
	}
	const server = withoutLogin(address);
	const { MLFLOW_TRACKING_TOKEN: token, MLFLOW_TRACKING_USERNAME: user, MLFLOW_TRACKING_PASSWORD: password } = env;
	if (token) server.headers.authorization = `Bearer ${token}`;
	else if (user) server.headers.authorization = `Basic ${Buffer.from(`${user}:${password ?? ""}`).toString("base64")}`;
	return server;
}

function paramText(value: unknown): string {
	const text = typeof value === "string" ? value : JSON.stringify(value);
	return text.slice(0, MOST_CHARACTERS);
}
