/** Beanie, AgentRL's own way to MongoDB, reads what is written here, and what it writes is read here. */
import { execFileSync, spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { MongoClient } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";
import { arl, root } from "./support/real.js";

const folder = temporaryFolder();
const python = process.env.ARL_PYTHON ?? "python3";

/** True (and reported) where no Python has Beanie. */
function beanieMissing(): boolean {
	const { status } = spawnSync(python, ["-c", "import beanie, sys; sys.exit(not beanie.__version__.startswith('2.'))"]);
	if (status === 0) return mongoMissing("documents of AgentRL's own models");
	process.stderr.write(
		`SKIPPED: documents of AgentRL's own models: ${python} has no beanie 2 (pip install beanie==2.2.0; ARL_PYTHON names another Python)\n`,
	);
	return true;
}

/** `write` or `read` of the script with AgentRL's models. */
function agentrl(command: "write" | "read", uri: string) {
	const script = join(root, "__test__", "support", "agentrl.py");
	return JSON.parse(execFileSync(python, ["-B", script, command, uri], { encoding: "utf8", stdio: "pipe" }));
}

describe.skipIf(beanieMissing())("documents of AgentRL's own models", () => {
	let server: MongoServer;
	let client: MongoClient;
	beforeAll(async () => {
		server = await startMongo();
		client = new MongoClient(server.uri);
	});
	afterAll(async () => {
		await client.close();
		await server.stop();
	});

	async function mongo(uri: string, ...words: string[]): Promise<string> {
		const { code, stdout, stderr } = await arl(["mongo", ...words, "--db_connection_string", uri]);
		expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
		return stdout;
	}

	it("are read as rows: a Record with its samples, and a DBRecordData", async () => {
		const uri = server.uriOf(newDatabase());
		const written = agentrl("write", uri);
		const rows = async (source: string) => {
			const out = join(mkdtempSync(join(folder, "out-")), "rows.jsonl");
			await mongo(uri, "export", "--db_source", source, "--out", out);
			return readFileSync(out, "utf8");
		};
		const record = await rows("Record");
		expect(record).toContain(
			'"parameters":{"$defs":{"n.x":{"$ref":"#/a"}},"minimum":1.0,"maximum":9007199254740993,"10":null,"2":true}',
		);
		expect(JSON.parse(record)).toMatchObject({
			messages: written.messages,
			scores: { 1: 1, 3: 1 },
			// The record's score less the mean of its task's, where a sample has none of its own.
			advantages: { 1: 0.5, 3: 0.25 },
			created_at_step: { 1: 4, 3: 0 },
			record_id: written.record,
		});
		const data = await rows("DBRecordData");
		expect(data).toContain('"maximum":9007199254740993,"10":null,"2":true}');
		expect(JSON.parse(data)).toMatchObject({
			messages: written.messages,
			advantages: { 3: 0.5 },
			created_at_step: { 3: 7 },
			step: 2,
			logprobs: null,
		});
		const status = JSON.parse(await mongo(uri, "status", "--json"));
		expect(status.collections).toMatchObject({
			Record: { documents: 2, by: { status: { ready: 1, created: 1 } }, trainable: { train: 1 } },
			DispatchedSamplingTask: { documents: 3, by: { status: { completed: 2, failed: 1 } } },
			Task: { documents: 1, by: { _class_id: { "Task.MCPTask": 1 } } },
			DBRecordData: { documents: 1, trainable: { train: 1 } },
		});
	}, 60_000);

	it("are what an import writes: Beanie validates them and follows their links", async () => {
		const name = newDatabase();
		const uri = server.uriOf(name);
		const messages = [
			{ role: "user", content: "1" },
			{ role: "assistant", content: "2", tool_calls: null },
			{ role: "user", content: "3" },
			{ role: "assistant", content: "4" },
		];
		const rows = [
			{ messages, tools: [{ "a.b": 1.5, $ref: "#/x" }], advantages: { 3: 2 }, reward: 0.5, record_id: 7 },
			{ messages: messages.slice(0, 2), scores: { 1: 0.75 } },
		];
		const path = join(folder, "in.jsonl");
		writeFileSync(path, rows.map((row) => `${JSON.stringify(row)}\n`).join(""));
		await mongo(uri, "import", path);
		await mongo(uri, "import", path, "--as", "Record");
		const { records, data } = agentrl("read", uri);
		const defaults = { scores: {}, advantages: {}, created_at_step: {}, logprobs: null, step: -1, integer_keys: true };
		expect(data).toEqual([
			{ ...defaults, messages, tools: rows[0]?.tools, advantages: { 3: 2 }, reward: 0.5, record_id: "7" },
			{ ...defaults, messages: messages.slice(0, 2), tools: null, scores: { 1: 0.75 }, reward: 1, record_id: null },
		]);
		const task = { class: "Task", status: "completed", split: "train" };
		const record = { split: "train", trained_count: 0, last_trained_step: -1 };
		const sample = { status: "completed", created_at_step: 0 };
		const request = { messages: messages.slice(0, 1), model: null };
		expect(records).toEqual([
			{
				...record,
				score: 0.5,
				meta_infos: { record_id: 7 },
				task: { ...task, scores: [0.5] },
				traj: [
					{
						...sample,
						request: { messages: messages.slice(0, 3), tools: rows[0]?.tools, model: null },
						message: messages[3],
						advantage: 2,
						score: null,
					},
				],
			},
			{
				...record,
				score: 1,
				meta_infos: {},
				task: { ...task, scores: [1] },
				traj: [{ ...sample, request, message: messages[1], advantage: 1, score: 0.75 }],
			},
		]);
		await client.db(name).dropDatabase();
	}, 60_000);
});
