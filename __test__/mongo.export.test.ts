/** What is in a database, counted; and its rows in files again, byte for byte. */
import { existsSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Binary, DBRef, Double, MongoClient, ObjectId } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";
import { arl } from "./support/real.js";
import { duck } from "./support/tables.js";

const folder = temporaryFolder();

const reply = (text: string) => `"messages":[{"role":"user","content":"?"},{"role":"assistant","content":"${text}"}]`;
const ROWS = [
	`{${reply("a")},"tools":[{"b":1.0,"a":9007199254740993,"2":null}],"advantages":{"1":0.5}}`,
	`{${reply("b")},"record_id":"x","reward":0.25,"step":7,"logprobs":{"1":{"content":[]}}}`,
	`{${reply("c")},"scores":{"1":1},"source":{"z":1,"y":[1.0]}}`,
	`{${reply("a")},"tools":[{"b":1.0,"a":9007199254740993,"2":null}],"advantages":{"1":0.5}}`,
];

describe.skipIf(mongoMissing("rows of a database in files"))("rows of a database", () => {
	let server: MongoServer;
	let uri: string;
	let client: MongoClient;
	let place: string;
	beforeAll(async () => {
		server = await startMongo();
		client = new MongoClient(server.uri);
	});
	afterAll(async () => {
		await client.close();
		await server.stop();
	});

	/** A new database, and a folder for files. */
	function fresh() {
		const name = newDatabase();
		uri = server.uriOf(name);
		place = mkdtempSync(join(folder, "export-"));
		return client.db(name);
	}

	const mongo = (...words: string[]) => arl(["mongo", ...words, "--db_connection_string", uri]);

	async function imported(rows: string[], ...words: string[]): Promise<void> {
		const path = join(place, "in.jsonl");
		writeFileSync(path, rows.map((row) => `${row}\n`).join(""));
		const { code, stderr } = await mongo("import", path, ...words);
		expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
	}

	async function exported(name: string, ...words: string[]): Promise<string> {
		const out = join(place, name);
		const { code, stderr } = await mongo("export", "--out", out, ...words);
		expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
		return readFileSync(out, "utf8");
	}

	it("are the same bytes when they are exported, imported and exported again", async () => {
		const db = fresh();
		await imported(ROWS);
		const first = await exported("first.jsonl");
		expect(first.split("\n")).toHaveLength(ROWS.length + 1);
		expect(first).toContain('"tools":[{"b":1.0,"a":9007199254740993,"2":null}]');
		await db.dropDatabase();
		await imported(first.trim().split("\n"));
		expect(await exported("second.jsonl")).toBe(first);
		await db.dropDatabase();
		await imported(first.trim().split("\n"), "--as", "Record");
		const records = await exported("records.jsonl");
		await db.dropDatabase();
		await imported(records.trim().split("\n"));
		const again = (await exported("again.jsonl")).trim().split("\n");
		const kept = ["messages", "tools", "scores", "advantages", "created_at_step", "reward", "step", "record_id"];
		const pick = (text: string) => {
			const row = new Map(Object.entries(JSON.parse(text)));
			return kept.map((key) => row.get(key) ?? null);
		};
		expect(again.map(pick)).toEqual(records.trim().split("\n").map(pick));
	}, 60_000);

	it("go into Parquet with lists and objects as JSON text", async () => {
		fresh();
		await imported(ROWS);
		await exported("rows.parquet");
		const rows = await duck(`from '${join(place, "rows.parquet")}'`);
		expect(rows.map(({ tools }) => tools)[0]).toBe('[{"b":1.0,"a":9007199254740993,"2":null}]');
		expect(rows.map(({ reward }) => reward)).toEqual([1, 0.25, 1, 1]);
		expect(rows.map(({ step }) => step)).toEqual([-1n, 7n, -1n, -1n]);
		expect(rows.map(({ messages }) => JSON.parse(String(messages))[1].content)).toEqual(["a", "b", "c", "a"]);
	});

	it("are chosen by split, collection and condition", async () => {
		fresh();
		await imported(ROWS.slice(0, 2));
		await imported(ROWS.slice(2), "--split", "valid");
		await imported(ROWS.slice(1, 2), "--as", "Record", "--split", "test");
		const both = await mongo("export", "--split", "none", "--out", join(place, "x.jsonl"));
		expect(both).toMatchObject({ code: 2 });
		expect(both.stderr).toContain("--db_source");
		const rows = async (...words: string[]) =>
			(await exported("rows.jsonl", "--overwrite", "--db_source", "DBRecordData", ...words)).trim().split("\n").length;
		expect(await rows()).toBe(2);
		expect(await rows("--split", "valid")).toBe(2);
		expect(await rows("--split", "none")).toBe(4);
		expect(await rows("--split", "none", "--db_match", '{"reward":{"$lt":0.5}}')).toBe(1);
		const none = await mongo("export", "--split", "eval", "--out", join(place, "y.jsonl"));
		expect(none).toMatchObject({ code: 3, stdout: "" });
	}, 60_000);

	it("that cannot be rows are all reported, and nothing is written", async () => {
		const db = fresh();
		const good = { _class_id: "DBRecordData", messages: [{ role: "assistant", content: "x" }], split: "train" };
		const bad = await db.collection("DBRecordData").insertMany(
			[good, { ...good, reward: new Double(Number.NaN) }, { ...good, x: new Binary(), y: /re/ }].map((d) => ({
				...d,
			})),
		);
		const failed = await mongo("export", "--out", join(place, "out.jsonl"));
		expect(failed.code).toBe(3);
		expect(failed.stderr).toContain(String(bad.insertedIds[1]));
		expect(failed.stderr).toContain(String(bad.insertedIds[2]));
		expect(readdirSync(place)).toEqual([]);
		const skipped = await mongo("export", "--out", join(place, "out.jsonl"), "--on_bad_row", "skip");
		expect(skipped).toMatchObject({ code: 0 });
		expect(skipped.stdout).toMatch(/^1 rows .*2 left out/);
		expect(skipped.stderr).toContain(String(bad.insertedIds[1]));
	});

	it("never overwrite a file unasked, and never stand half-written", async () => {
		fresh();
		await imported(ROWS);
		writeFileSync(join(place, "mine.jsonl"), "mine");
		const refused = await mongo("export", "--out", join(place, "mine.jsonl"));
		expect(refused).toMatchObject({ code: 2 });
		expect(refused.stderr).toContain("--overwrite");
		expect(readFileSync(join(place, "mine.jsonl"), "utf8")).toBe("mine");
		expect(existsSync(join(place, "mine.jsonl.partial"))).toBe(false);
	});

	it("are counted by collection, status, split and trained_count, with the index that is missing", async () => {
		const db = fresh();
		const link = new DBRef("Task", new ObjectId());
		const record = (status: string, split: string | null, score: number | null, trained_count: number) => ({
			...{ _class_id: "Record", task: link, traj: [], status, split, score, trained_count },
		});
		await db
			.collection("Record")
			.insertMany([
				...[record("ready", "train", 1, 0), record("ready", "train", 0, 3), record("ready", "valid", null, 0)],
				...[record("created", null, null, 0), record("abandoned", "train", 1, 0)],
			]);
		await db.collection("DBRecordData").insertMany([{ split: "train" }, { split: "train", fetched: true }]);
		await db.collection("Task").insertOne({ _class_id: "Task.MCPTask", status: "created" });
		await db.collection("Record").createIndex({ split: 1, status: 1, other: 1 });
		const before = await db.collection("DBRecordData").indexes();
		const { code, stdout } = await mongo("status", "--json");
		expect(code).toBe(0);
		expect(JSON.parse(stdout)).toEqual({
			database: expect.stringMatching(/arl_test_/),
			collections: {
				Record: {
					documents: 5,
					by: {
						_class_id: { Record: 5 },
						status: { ready: 3, created: 1, abandoned: 1 },
						split: { train: 3, valid: 1, none: 1 },
						trained_count: { 0: 4, 3: 1 },
					},
					trainable: { train: 1 },
				},
				DBRecordData: {
					documents: 2,
					by: { split: { train: 2 }, fetched: { none: 1, true: 1 } },
					trainable: { train: 1 },
				},
				Task: { documents: 1, by: { _class_id: { "Task.MCPTask": 1 }, status: { created: 1 } }, trainable: null },
			},
			missing_indexes: [
				{
					collection: "DBRecordData",
					key: { split: 1, _id: 1 },
					command: "db.DBRecordData.createIndex({ split: 1, _id: 1 })",
				},
			],
		});
		expect(await db.collection("DBRecordData").indexes()).toEqual(before);
		const printed = await mongo("status");
		expect(printed.stdout).toContain("trained_count 0 4, 3 1");
		expect(printed.stdout).toContain("to train on   train 1");
		expect(printed.stdout).toContain("db.DBRecordData.createIndex({ split: 1, _id: 1 })");
	});

	it("and nothing else are what an empty database is reported to need", async () => {
		fresh();
		const { code, stdout } = await mongo("status");
		expect(code).toBe(0);
		expect(stdout).toContain("arl mongo import");
	});
});
