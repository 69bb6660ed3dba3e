/** Rows of files into AgentRL's collections: exact, in order, once. */
import { BSON, type Document, MongoClient, ObjectId } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { MongoConnection } from "../src/mongo/connection.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { chat, check, fresh as freshDatabase, importFile, rowsFile, rowsOf } from "./support/import.js";
import { killMissing, type MongoServer, mongoMissing, startMongo } from "./support/mongo.js";

const folder = temporaryFolder();
const file = (rows: string[]) => rowsFile(folder, rows);

/** Documents with their exact types: a tree of `[type, value]`. */
async function typed(connection: MongoConnection, collection: string): Promise<Document[]> {
	const raw = await connection.db.collection(collection).find({}, { raw: true }).sort({ _id: 1 }).toArray();
	return raw.map((bytes) => BSON.deserialize(bytes as unknown as Uint8Array, { promoteValues: false }));
}

describe.skipIf(mongoMissing("importing rows"))("an import", () => {
	let server: MongoServer;
	beforeAll(async () => {
		server = await startMongo();
	});
	afterAll(() => server.stop());
	const fresh = <T>(use: (connection: MongoConnection) => Promise<T>) => freshDatabase(server, use);

	it("keeps the order of keys, floats, integers of 64 bits, and nulls", () =>
		fresh(async (connection) => {
			const messages =
				'[{"content":"?","role":"user","10":1,"2":2},{"role":"assistant","content":null,"weight":1.0,"tool_calls":[{"function":{"arguments":{"b":9007199254740993,"a":-0.0,"c":1e-07},"name":"f"}}]}]';
			const tools =
				'[{"type":"function","function":{"parameters":{"defs":{"z":{"y":1}},"maximum":9223372036854775807,"minimum":1.0,"":null,"__proto__":{}},"name":"f"}}]';
			const row = `{"tools":${tools},"messages":${messages},"advantages":{"1":0.5},"chat_template_kwargs":{"b":1,"a":2}}`;
			await importFile(connection, file([row]));
			const [stored] = await rowsOf(connection, "DBRecordData");
			expect(stored).toContain(`"messages":${messages.replace("1e-07", "1e-7")}`);
			expect(stored).toContain(`"tools":${tools}`);
			expect(stored).toContain('"advantages":{"1":0.5}');
			expect(stored).toContain('"chat_template_kwargs":{"b":1,"a":2}');
			const [document] = await typed(connection, "DBRecordData");
			expect(Object.keys(document ?? {})).toEqual([
				...["_id", "_class_id", "messages", "tools", "scores", "advantages", "created_at_step", "reward", "step"],
				...["logprobs", "record_id", "chat_template_kwargs", "split", "fetched"],
			]);
			expect(document?.messages[0]["2"]._bsontype).toBe("Int32");
			expect(document?.messages[1].weight._bsontype).toBe("Double");
			expect(document?.messages[1].tool_calls[0].function.arguments.b._bsontype).toBe("Long");
			expect(document).toMatchObject({ _class_id: "DBRecordData", logprobs: null, record_id: null, split: "train" });
			expect(document?.fetched).toBe(false);
			expect([document?.reward._bsontype, document?.step._bsontype]).toEqual(["Double", "Int32"]);
		}));

	it("keeps keys with dots and $ in tools, as they are or in text where the server is too old for them", () =>
		fresh(async (connection) => {
			const tools = '[{"$defs":{"a.b":{"$ref":"#/x","$id":"y"}},"$id":1.0,"$ref":{"$db":null}}]';
			const result = await importFile(connection, file([chat("a", `,"tools":${tools}`)]));
			const stored = result.toolsAsText === 0 ? tools : JSON.stringify(tools);
			expect((await rowsOf(connection, "DBRecordData"))[0]).toContain(`"tools":${stored},`);
		}));

	it("writes tools as text where an integer has more than 64 bits, and names any other such integer", () =>
		fresh(async (connection) => {
			const tools = '[{"maximum":18446744073709551616}]';
			const result = await importFile(connection, file([chat("a", `,"tools":${tools}`)]));
			expect(result).toMatchObject({ written: 1, toolsAsText: 1 });
			expect((await rowsOf(connection, "DBRecordData"))[0]).toContain(`"tools":${JSON.stringify(tools)}`);
			const [bad] = await check(file([chat("b"), chat("b", ',"step":18446744073709551616')]));
			expect(bad).toMatchObject({ row: 1, reason: "too large" });
			expect(bad?.message).toContain("18446744073709551616");
		}));

	it("writes tools as text where the server refuses them, and says how often", () =>
		fresh(async (connection) => {
			// Stands for a server that knows no such keys: it refuses tools that are an array.
			const validator = { $jsonSchema: { properties: { tools: { bsonType: ["string", "null"] } } } };
			await connection.db.createCollection("DBRecordData", { validator });
			const tools = '[{"$ref":"#/a","b.c":1.0}]';
			const result = await importFile(connection, file([chat("a"), chat("b", `,"tools":${tools}`), chat("c")]));
			expect(result).toMatchObject({ written: 3, present: 0, toolsAsText: 1 });
			const rows = await rowsOf(connection, "DBRecordData");
			expect(rows[1]).toContain(`"tools":${JSON.stringify(tools)}`);
			expect(rows[0]).toContain('"tools":null');
		}));

	it("names the row that the server refuses, and goes on when it is repeated", () =>
		fresh(async (connection) => {
			await connection.db.collection("DBRecordData").createIndex({ record_id: 1 }, { unique: true });
			const path = file([chat("a", ',"record_id":"x"'), chat("b", ',"record_id":"x"')]);
			const error = await errorOf(importFile(connection, path));
			expect(error.code).toBe("ARL_DATA");
			expect(error.message).toMatch(/rows\.jsonl:2: .*refuses its DBRecordData.*unique index/);
			await connection.db.collection("DBRecordData").dropIndexes();
			expect(await importFile(connection, path)).toMatchObject({ written: 1, present: 1 });
		}));

	it("gives the rows in the order of the file, equal ones too", () =>
		fresh(async (connection) => {
			const texts = Array.from({ length: 2500 }, (_, i) => (i % 7 === 0 ? "same" : `text ${i}`));
			await importFile(connection, file(texts.map((text) => chat(text))));
			const rows = await rowsOf(connection, "DBRecordData");
			expect(rows.map((row) => JSON.parse(String(row)).messages[1].content)).toEqual(texts);
		}));

	it("puts rows behind those that are there, whatever wrote them", () =>
		fresh(async (connection) => {
			const ids = () => connection.db.collection("DBRecordData").find().sort({ _id: 1 }).toArray();
			const foreign = new ObjectId();
			await connection.db.collection<{ _id: ObjectId | string }>("DBRecordData").insertOne({ _id: foreign });
			await importFile(connection, file([chat("b"), chat("a")]));
			await connection.db.collection<{ _id: string }>("DBRecordData").insertOne({ _id: "a text" });
			await importFile(connection, file([chat("a"), chat("d"), chat("c")]));
			const found = await ids();
			expect(found.map(({ _id, messages }) => messages?.[1].content ?? String(_id))).toEqual([
				...["a text", String(foreign), "b", "a", "d", "c"],
			]);
			// No place is left behind this one.
			await connection.db.collection("DBRecordData").insertOne({ _id: new ObjectId("f".repeat(24)) });
			expect(await importFile(connection, file([chat("f"), chat("e")]))).toMatchObject({ written: 2 });
			const texts = (await ids()).flatMap(({ messages }) => messages?.[1].content ?? []);
			expect(texts.indexOf("f")).toBeLessThan(texts.indexOf("e"));
		}));

	it("doubles nothing when it is repeated, with more rows or in another order; another split is another row", () =>
		fresh(async (connection) => {
			const rows = ["a", "b", "a", "c"].map((text) => chat(text));
			for (const kind of ["DBRecordData", "Record"] as const) {
				expect(await importFile(connection, file(rows), { kind })).toMatchObject({ written: 4, present: 0 });
				expect(await importFile(connection, file(rows), { kind })).toMatchObject({ written: 0, present: 4 });
				const more = [chat("d"), ...[...rows].reverse(), chat("a")];
				expect(await importFile(connection, file(more), { kind })).toMatchObject({ written: 2, present: 4 });
				const valid = await importFile(connection, file(rows), { kind, split: "valid" });
				expect(valid).toMatchObject({ written: 4, present: 0 });
				expect(await connection.db.collection(kind).countDocuments({ split: "train" })).toBe(6);
			}
		}));

	it("takes a row's own split, and refuses one that is not the split that was asked for", () =>
		fresh(async (connection) => {
			const path = file([chat("a", ',"split":"eval"'), chat("b")]);
			await importFile(connection, path);
			const found = await connection.db.collection("DBRecordData").find().sort({ _id: 1 }).toArray();
			expect(found.map(({ split }) => split)).toEqual(["eval", "train"]);
			expect(await check(path, { split: "train" })).toMatchObject([{ row: 0, reason: "other split" }]);
			expect(await check(file([chat("a", ',"split":"dev"')]))).toMatchObject([{ reason: "bad field" }]);
		}));

	it(
		"goes on where it was broken off, and leaves no record whose links lead nowhere",
		() =>
			fresh(async (connection) => {
				const path = file(
					Array.from({ length: 1200 }, (_, i) =>
						JSON.stringify({
							messages: ["user", "assistant", "user", "assistant"].map((role, at) => ({ role, content: `${i} ${at}` })),
						}),
					),
				);
				// The connection that breaks for good in the middle of a batch: after its samples, before its records.
				let sent = 0;
				const broken = Object.create(connection, {
					attempt: {
						value: (doing: string, action: () => Promise<unknown>) => {
							if (doing === "writing into Record" && ++sent === 2) throw new Error("broken off");
							return connection.attempt(doing, action);
						},
					},
				});
				await expect(importFile(broken, path, { kind: "Record" })).rejects.toThrow("broken off");
				const records = await connection.db.collection("Record").find().toArray();
				expect(records.length).toBeGreaterThan(0);
				expect(records.length).toBeLessThan(1200);
				const idOf = (link: Document) => link.oid ?? link.$id;
				for (const [name, links, each] of [
					["Task", records.map(({ task }) => task), 1],
					["DispatchedSamplingTask", records.flatMap(({ traj }) => traj), 2],
				] as const) {
					const found = await connection.db.collection(name).countDocuments({ _id: { $in: links.map(idOf) } });
					expect([links.length, found]).toEqual([records.length * each, records.length * each]);
				}
				const result = await importFile(connection, path, { kind: "Record" });
				expect(result).toMatchObject({ written: 1200 - records.length, present: records.length });
				for (const [name, count] of [
					["Record", 1200],
					["Task", 1200],
					["DispatchedSamplingTask", 2400],
				] as const) {
					expect(await connection.db.collection(name).countDocuments()).toBe(count);
				}
				const rows = await rowsOf(connection, "Record");
				expect(rows.map((row) => JSON.parse(String(row)).messages[0].content)).toEqual(
					Array.from({ length: 1200 }, (_, i) => `${i} 0`),
				);
			}),
		60_000,
	);

	it("writes a Record with its Task and a sample for each trained reply, linked as AgentRL links them", () =>
		fresh(async (connection) => {
			const row = {
				messages: [
					{ role: "user", content: "1" },
					{ role: "assistant", content: "2" },
					{ role: "user", content: "3" },
					{ role: "assistant", content: "4" },
					{ role: "tool", content: "5", tool_call_id: "c" },
					{ role: "assistant", content: "6" },
				],
				tools: [{ type: "function", function: { name: "f" } }],
				advantages: { 1: 0.5, 5: -1.5 },
				scores: { 1: 0.25, 3: 7.5 },
				logprobs: { 5: { content: [] } },
				created_at_step: { 5: 12 },
				reward: 0.75,
				step: 3,
				record_id: "r1",
				source: "web",
			};
			await importFile(connection, file([JSON.stringify(row)]), { kind: "Record" });
			const [record] = await connection.db.collection("Record").find().toArray();
			const [task] = await connection.db.collection("Task").find().toArray();
			const samples = await connection.db.collection("DispatchedSamplingTask").find().toArray();
			expect(record).toMatchObject({
				_class_id: "Record",
				split: "train",
				status: "ready",
				score: 0.75,
				trained_count: 0,
				last_trained_step: -1,
				meta_infos: { source: "web", record_id: "r1", step: 3, scores: { 3: 7.5 } },
			});
			expect(record?.task.toJSON()).toMatchObject({ $ref: "Task", $id: task?._id });
			const links = record?.traj.map((link: { toJSON(): Document }) => link.toJSON());
			expect(links.map(({ $ref }: Document) => $ref)).toEqual(["DispatchedSamplingTask", "DispatchedSamplingTask"]);
			const [first, second] = links.map(({ $id }: Document) => samples.find(({ _id }) => _id.equals($id)));
			expect(first).toMatchObject({ status: "completed", advantage: 0.5, score: 0.25, req_type: "chatcompletions" });
			expect(first?.request.messages).toEqual(row.messages.slice(0, 1));
			expect(second).toMatchObject({
				advantage: -1.5,
				score: null,
				created_at_step: 12,
				request: { tools: row.tools },
			});
			expect(second?.response.choices[0]).toMatchObject({ message: row.messages[5], logprobs: { content: [] } });
			const [text] = await rowsOf(connection, "Record");
			const read = JSON.parse(String(text));
			expect(read).toMatchObject({
				messages: row.messages,
				tools: row.tools,
				advantages: row.advantages,
				reward: 0.75,
			});
		}));
});

describe.skipIf(killMissing("an import while the server is killed"))("an import while the server is killed", () => {
	it("waits for the server, loses nothing and doubles nothing", async () => {
		const server = await startMongo();
		const connection = await MongoConnection.open(server.uri, { retrySeconds: 30 });
		try {
			const texts = Array.from({ length: 6000 }, (_, i) => `row ${i} ${"x".repeat(300)}`);
			const running = importFile(connection, file(texts.map((text) => chat(text))));
			const watcher = new MongoClient(server.uri);
			while ((await watcher.db().collection("DBRecordData").estimatedDocumentCount()) === 0) {
				await new Promise((resolve) => setTimeout(resolve, 5));
			}
			await watcher.close();
			await server.kill();
			await server.restart();
			await running;
			const rows = await rowsOf(connection, "DBRecordData");
			expect(rows.map((row) => JSON.parse(String(row)).messages[1].content)).toEqual(texts);
		} finally {
			await connection.close();
			await server.stop();
		}
	}, 60_000);
});
