/** A page for Prometheus to scrape during the run: the latest value of each metric, in its text format 0.0.4. */
import { createServer, type Server } from "node:http";
import { METRICS_FILE } from "../metrics.js";
import { metricsOfLine } from "./lines.js";
import type { Sink } from "./outbox.js";

/** Where the page is: `127.0.0.1:9464`. */
export interface Address {
	host: string;
	port: number;
}

export interface PrometheusPage {
	sink: Sink;
	/** Resolves once the page can be scraped, with its port; rejects if the address cannot be had. */
	listening: Promise<number>;
	close(): void;
}

/** Opens the page for the run `name`. */
export function openPrometheusPage(name: string, { host, port }: Address): PrometheusPage {
	const values = new Map<string, number>();
	const server: Server = createServer((request, response) => {
		const path = (request.url ?? "").split("?")[0];
		response.setHeader("content-type", "text/plain; version=0.0.4; charset=utf-8");
		response.statusCode = path === "/metrics" ? 200 : 404;
		response.end(path === "/metrics" ? pageText(name, values) : "The metrics are at /metrics.\n");
	});
	const listening = new Promise<number>((resolve, reject) => {
		server.once("error", reject);
		server.listen(port, host, () => {
			const address = server.address();
			resolve(typeof address === "object" && address !== null ? address.port : port);
		});
	});
	// The run's process ends when the run does.
	server.unref();
	return {
		sink: {
			name: "prometheus",
			source: METRICS_FILE,
			async send(lines) {
				for (const line of lines) {
					const found = metricsOfLine(line);
					if (found === null) continue;
					for (const [metric, value] of [["step", found.step] as const, ...found.values]) values.set(metric, value);
				}
			},
		},
		listening,
		close() {
			server.close();
			server.closeAllConnections();
		},
	};
}

/** `HOST:PORT`, or `[HOST]:PORT`. */
export function parseAddress(text: string): Address {
	const { hostname, port } = new URL(`http://${text}`);
	return { host: hostname.replace(/^\[|\]$/g, ""), port: port === "" ? 80 : Number(port) };
}

/** The page's text: each metric as a gauge with the run's name. */
export function pageText(name: string, values: ReadonlyMap<string, number>): string {
	const run = name.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n");
	return [...values]
		.map(([metric, value]) => {
			const full = `arl_${metric.replaceAll(/[^A-Za-z0-9_]/g, "_")}`;
			return `# TYPE ${full} gauge\n${full}{run="${run}"} ${value}\n`;
		})
		.join("");
}
