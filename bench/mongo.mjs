// Reading rows of a database: documents of some 2 kB are written to a server of its own (or to ARL_TEST_MONGODB_URI), then
// read as a run reads them. Prints one JSON line a case: seconds from the connection to the first 64 rows, right after they were
// written and once more, the processor time of it here and in the server, rows a second in shuffled order, the peak of
// resident memory of the reading process; and of a whole run (the model of assets, one row a step, else as it is without options)
// the seconds from its connection until the first step begins and until it is done.
//
//   node bench/mongo.mjs [--rows 100000] [--as DBRecordData,Record]

import { fork } from "node:child_process";
import { randomBytes } from "node:crypto";
import { subscribe, unsubscribe } from "node:diagnostics_channel";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { cpus, loadavg, tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const { values: a } = parseArgs({
	options: {
		rows: { type: "string", default: "100000" },
		as: { type: "string", default: "DBRecordData,Record" },
		read: { type: "string" },
		pid: { type: "string" },
	},
});

const BATCH = 256;
const DEFAULTS = { db_match: {}, split: "train", max_trained_count: 1, retrained_interval: 1 };

if (a.read === undefined) await main();
else await read(a.read, a.as);

async function main() {
	const { DBRef, MongoClient, ObjectId } = await import("mongodb");
	const { startServer } = await import("../scripts/mongo-server.mjs");
	const rows = Number(a.rows);
	const dir = mkdtempSync(join(tmpdir(), "arl-bench-"));
	const given = process.env.ARL_TEST_MONGODB_URI;
	const server = given === undefined ? await startServer({ dir, args: ["--standalone"] }) : null;
	const name = `arl_bench_${process.pid}`;
	const uri = server ? `mongodb://127.0.0.1:${server.port}/${name}` : withDatabase(given, name);
	const client = await new MongoClient(uri).connect();
	try {
		const text = () => randomBytes(850).toString("hex");
		for (const collection of a.as.split(",")) {
			for (let at = 0; at < rows; at += 1000) {
				const count = Math.min(1000, rows - at);
				const messages = (i) => [{ role: "user", content: `Question ${at + i}: ${text().slice(0, 200)}` }];
				const documents = Array.from({ length: count }, (_, i) => ({
					messages: messages(i),
					reply: { role: "assistant", content: text() },
				}));
				if (collection === "DBRecordData") {
					await client
						.db()
						.collection(collection)
						.insertMany(
							documents.map(({ messages, reply }) => ({
								messages: [...messages, reply],
								split: "train",
								fetched: false,
							})),
						);
					continue;
				}
				const samples = documents.map(({ messages, reply }) => ({
					_id: new ObjectId(),
					status: "completed",
					request: { messages },
					response: { choices: [{ message: reply }] },
				}));
				await client.db().collection("DispatchedSamplingTask").insertMany(samples);
				await client
					.db()
					.collection(collection)
					.insertMany(
						samples.map(({ _id }) => ({
							traj: [new DBRef("DispatchedSamplingTask", _id)],
							status: "ready",
							split: "train",
							score: 1.5,
						})),
					);
			}
			await new Promise((resolve, reject) => {
				const own = server === null ? [] : ["--pid", String(server.child.pid)];
				const child = fork(fileURLToPath(import.meta.url), ["--read", uri, "--as", collection, ...own]);
				child.on("exit", (code) => (code === 0 ? resolve() : reject(new Error(`reading ended with ${code}`))));
			});
		}
	} finally {
		await client.db().dropDatabase();
		await client.close();
		server?.child.kill("SIGKILL");
		rmSync(dir, { recursive: true, force: true });
	}
}

function withDatabase(uri, name) {
	const url = new URL(uri);
	url.pathname = `/${name}`;
	return url.href;
}

async function read(uri, collection) {
	const { MongoConnection } = await import("../dist/mongo/connection.js");
	const { openDatabaseRows } = await import("../dist/mongo/database.js");
	const { shuffle } = await import("../dist/data/sampler/order.js");
	const open = async () => {
		const started = performance.now();
		const cpu = process.cpuUsage();
		const serverBefore = serverCpuSeconds();
		const connection = await MongoConnection.open(uri);
		const source = await openDatabaseRows(connection, { ...DEFAULTS, db_source: collection });
		const order = shuffle(
			Uint32Array.from({ length: source.length }, (_, i) => i),
			"bench",
		);
		await source.read(order.subarray(0, 64));
		const firstRows = (performance.now() - started) / 1000;
		const { user, system } = process.cpuUsage(cpu);
		return { source, order, firstRows, cpu: (user + system) / 1e6, serverCpu: serverCpuSeconds() - serverBefore };
	};
	// A server that has just been filled has to bring documents back into its cache.
	const cold = await open();
	await cold.source.close();
	const { source, order, ...warm } = await open();
	const first = performance.now();
	let bytes = 0;
	for (let at = 0; at < order.length; at += BATCH) {
		for (const row of await source.read(order.subarray(at, at + BATCH))) bytes += row.length;
	}
	const seconds = (performance.now() - first) / 1000;
	await source.close();
	const peak = peakMib();
	const run = await firstStep(uri, collection);
	const round = (x, digits) => Number(x.toFixed(digits));
	console.log(
		JSON.stringify({
			bench: "mongo",
			collection,
			rows: source.length,
			meanRowBytes: Math.round(bytes / source.length),
			firstRowsSecondsCold: round(cold.firstRows, 2),
			cpuSecondsCold: round(cold.cpu, 2),
			serverCpuSecondsCold: round(cold.serverCpu, 2),
			firstRowsSeconds: round(warm.firstRows, 2),
			cpuSeconds: round(warm.cpu, 2),
			serverCpuSeconds: round(warm.serverCpu, 2),
			rowsPerSecond: Math.round(source.length / seconds),
			peakRssMib: round(peak, 0),
			runListedSeconds: round(run.listed, 2),
			runStepBeginsSeconds: round(run.begins, 2),
			runStepDoneSeconds: round(run.done, 2),
			runStepTokens: run.tokens,
			cpu: cpus()[0]?.model ?? "",
			cores: cpus().length,
			load: round(loadavg()[0], 1),
			node: process.version,
		}),
	);
}

/** A run of one step: seconds from the first connection to a server. */
async function firstStep(uri, collection) {
	const { QwenTrainer } = await import("../dist/index.js");
	const dir = mkdtempSync(join(tmpdir(), "arl-bench-run-"));
	const place = fileURLToPath(new URL("../assets/model", import.meta.url));
	let connected = null;
	const note = () => {
		connected ??= performance.now();
	};
	subscribe("net.client.socket", note);
	try {
		const args = { model_name_or_path: place, db_connection_string: uri, db_source: collection, output_dir: dir };
		const rest = { max_steps: 1, per_device_train_batch_size: 1, save_strategy: "no", mongo_write_back: "none" };
		const found = {};
		for await (const event of new QwenTrainer({ args: { ...args, ...rest } }).run()) {
			const now = (performance.now() - connected) / 1000;
			if (event.type === "check" && event.name === "rows") found.listed = now;
			if (event.type !== "step") continue;
			found.begins = now - (event.seconds - event.dataSeconds);
			found.done = now;
			found.tokens = event.tokens;
		}
		return found;
	} finally {
		unsubscribe("net.client.socket", note);
		rmSync(dir, { recursive: true, force: true });
	}
}

/** Processor time of a server of one's own, as Linux counts it (in hundredths); NaN where it is not known. */
function serverCpuSeconds() {
	try {
		const fields = readFileSync(`/proc/${a.pid}/stat`, "utf8").split(") ")[1].split(" ");
		return (Number(fields[11]) + Number(fields[12])) / 100;
	} catch {
		return Number.NaN;
	}
}

/** Peak resident memory in MiB, as the kernel counts it. */
function peakMib() {
	try {
		return Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]) / 1024;
	} catch {
		return process.resourceUsage().maxRSS / 1024;
	}
}
