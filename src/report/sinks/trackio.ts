/**
 * A trackio server, by `POST /api/bulk_log`. Each line has an id made of its text, by which the server passes over lines that it
 * has already.
 */
import { createHash, randomUUID } from "node:crypto";
import { ArlError } from "../../errors.js";
import { METRICS_FILE } from "../metrics.js";
import type { ShownOption } from "../runs/record.js";
import { request } from "./http.js";
import { metricsOfLine, tagOf } from "./lines.js";
import type { Sink } from "./outbox.js";

/**
 * A resumed run continues the same run. `env`: `TRACKIO_SERVER_URL`, which may have the token as `?write_token=`, else
 * `TRACKIO_WRITE_TOKEN`, as trackio's own client takes them; `TRACKIO_PROJECT` (`arl`).
 *
 * @throws ArlError `ARL_CONFIG` if there is no server's address or no token.
 */
export function trackioSink(name: string, options: readonly ShownOption[], env: NodeJS.ProcessEnv = process.env): Sink {
	const { url, token } = serverOf(env);
	const project = env.TRACKIO_PROJECT || "arl";
	const config = Object.fromEntries(options.map((option) => [option.name, option.value]));
	return {
		name: "trackio",
		source: METRICS_FILE,
		async send(lines, memory, signal) {
			memory.runId ??= randomUUID();
			const { runId } = memory;
			const logs = lines.flatMap((line) => {
				const found = metricsOfLine(line);
				if (found === null) return [];
				const metrics = Object.fromEntries(found.values.map(([key, value]) => [tagOf(key), value]));
				const id = createHash("sha256").update(`${runId}\n${line}`).digest("hex").slice(0, 32);
				return [{ project, run: name, run_id: runId, metrics, step: found.step, config, log_id: id }];
			});
			if (logs.length === 0) return;
			const body = { logs, hf_token: null };
			await request({
				method: "POST",
				url: `${url}/api/bulk_log`,
				headers: { "x-trackio-write-token": token },
				body,
				signal,
			});
		},
	};
}

function serverOf(env: NodeJS.ProcessEnv): { url: string; token: string } {
	const address = env.TRACKIO_SERVER_URL ?? "";
	if (!/^https?:\/\//.test(address)) {
		throw new ArlError(
			"ARL_CONFIG",
			"report_to trackio: TRACKIO_SERVER_URL is not the http address of a trackio server",
			"Set it to the address that `trackio show` prints, with its write_token.",
		);
	}
	const url = new URL(address);
	const token = url.searchParams.get("write_token") ?? env.TRACKIO_WRITE_TOKEN ?? "";
	if (token === "") {
		throw new ArlError(
			"ARL_CONFIG",
			"report_to trackio: the server takes metrics with its write token only, and none is given",
			"Set TRACKIO_WRITE_TOKEN, or add ?write_token=... to TRACKIO_SERVER_URL.",
		);
	}
	return { url: `${url.origin}${url.pathname.replace(/\/$/, "")}`, token };
}
