/** Documents of a database as rows: which are chosen, how links are followed, and how each bad one is named. */
import { Binary, DBRef, type Document, Double, MongoClient, ObjectId } from "mongodb";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { ConvertRecordToData } from "../src/data/sources/convert.js";
import { MongoConnection } from "../src/mongo/connection.js";
import { openDatabaseRows } from "../src/mongo/database.js";
import type { SelectionOptions } from "../src/mongo/selection.js";
import type { DatabaseRows } from "../src/mongo/source.js";
import { cutting } from "./support/cutting.js";
import { errorOf } from "./support/folder.js";
import { type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";

const DEFAULTS: SelectionOptions = {
	db_source: "auto",
	db_match: {},
	split: "train",
	max_trained_count: 1,
	retrained_interval: 1,
};

const messages = (text: string) => [
	{ role: "user", content: "?" },
	{ role: "assistant", content: text },
];

const data = (text: string, more: Document = {}): Document => ({
	_class_id: "DBRecordData",
	messages: messages(text),
	split: "train",
	fetched: false,
	...more,
});

const sample = (text: string, more: Document = {}): Document => ({
	_id: new ObjectId(),
	_class_id: "DispatchedSamplingTask",
	status: "completed",
	req_type: "chatcompletions",
	request: { messages: [{ role: "user", content: "?" }] },
	response: { choices: [{ message: { role: "assistant", content: text } }] },
	...more,
});

const record = (traj: unknown, more: Document = {}): Document => ({
	_id: new ObjectId(),
	_class_id: "Record",
	split: "train",
	status: "ready",
	score: new Double(1),
	trained_count: 0,
	last_trained_step: -1,
	traj,
	...more,
});

const ref = (id: unknown, collection = "DispatchedSamplingTask") => new DBRef(collection, id as ObjectId);

describe.skipIf(mongoMissing("rows of a database"))("rows of a database", () => {
	let server: MongoServer;
	let client: MongoClient;
	const opened: DatabaseRows[] = [];
	beforeAll(async () => {
		server = await startMongo();
		client = await new MongoClient(server.uri).connect();
	});
	afterEach(async () => {
		for (const rows of opened.splice(0)) await rows.close();
	});
	afterAll(async () => {
		await client?.close();
		await server?.stop();
	});

	/** A new database with these documents by collection. */
	async function fill(collections: Record<string, Document[]>): Promise<string> {
		const name = newDatabase();
		for (const [collection, documents] of Object.entries(collections)) {
			if (documents.length > 0) await client.db(name).collection(collection).insertMany(documents);
		}
		return name;
	}

	async function open(name: string, options: Partial<SelectionOptions> = {}, convert?: ConvertRecordToData) {
		const connection = await MongoConnection.open(server.uriOf(name));
		try {
			const rows = await openDatabaseRows(connection, { ...DEFAULTS, ...options }, convert);
			opened.push(rows);
			return rows;
		} catch (error) {
			await connection.close();
			throw error;
		}
	}

	/** What each row says: the text of its last reply, or why it has none. */
	async function said(
		rows: DatabaseRows,
		indexes = Array.from({ length: rows.length }, (_, i) => i),
	): Promise<string[]> {
		return (await rows.read(indexes)).map((row) => {
			if (!(row instanceof Uint8Array)) return `${row.reason}: ${row.message}`;
			return JSON.parse(Buffer.from(row).toString()).messages.at(-1).content;
		});
	}

	it("are chosen by split, state and count, and by one's own condition", async () => {
		const name = await fill({
			DBRecordData: [
				data("a"),
				data("none", { split: null }),
				data("valid", { split: "valid" }),
				data("fetched", { fetched: true }),
				data("twice", { trained_count: 2 }),
				data("zero", { trained_count: 0, source: { name: "web" } }),
			],
		});
		expect(await said(await open(name))).toEqual(["a", "none", "zero"]);
		expect(await said(await open(name, { split: "valid" }))).toEqual(["valid"]);
		expect(await said(await open(name, { split: null }))).toEqual(["a", "none", "valid", "zero"]);
		expect(await said(await open(name, { max_trained_count: 3 }))).toEqual(["a", "none", "twice", "zero"]);
		expect(await said(await open(name, { db_match: { "source.name": "web" } }))).toEqual(["zero"]);
		expect(await said(await open(name, { db_match: { $or: [{ split: null }, { trained_count: 0 }] } }))).toEqual([
			"none",
			"zero",
		]);
	});

	it("are found by Extended JSON, and what is left of each condition is reported where there are none", async () => {
		const documents = [data("a"), data("b")].map((document) => ({ _id: new ObjectId(), ...document }));
		const name = await fill({ DBRecordData: documents });
		const match = { _id: { $gt: { $oid: documents[0]?._id.toHexString() ?? "" } } };
		expect(await said(await open(name, { db_match: match }))).toEqual(["b"]);
		const error = await errorOf(open(name, { split: "eval" }));
		expect(error.code).toBe("ARL_DATA");
		expect(error.message).toContain("Record: 0 documents");
		expect(error.message).toMatch(/DBRecordData: 2 documents; of them 2 with fetched false, .* 0 with split eval/);
		const wrong = await errorOf(open(name, { db_match: { _id: { $oid: "x" } } }));
		expect(wrong.code).toBe("ARL_CONFIG");
	});

	it("come from the collection that has some; where both have, one is asked for", async () => {
		const one = sample("from a record");
		const name = await fill({
			DBRecordData: [data("from data")],
			Record: [record([ref(one._id)])],
			DispatchedSamplingTask: [one],
		});
		const error = await errorOf(open(name));
		expect(error.code).toBe("ARL_CONFIG");
		expect(error.message).toContain("Record (1) and DBRecordData (1)");
		expect(error.hint).toContain("--db_source");
		expect(await said(await open(name, { db_source: "Record" }))).toEqual(["from a record"]);
		expect(await said(await open(name, { db_source: "DBRecordData" }))).toEqual(["from data"]);
	});

	it("are records in state ready with a score", async () => {
		const one = sample("x");
		const traj = [ref(one._id)];
		const name = await fill({
			Record: [
				record(traj, { status: "abandoned" }),
				record(traj, { score: null }),
				record(traj, { trained_count: 1 }),
				record(traj, { _class_id: "Record.Child" }),
				((document) => {
					const { _class_id, split, trained_count, ...rest } = document;
					return rest;
				})(record(traj)),
			],
			DispatchedSamplingTask: [one],
		});
		expect((await open(name)).length).toBe(2);
	});

	it("leave out what was trained less than retrained_interval steps ago", async () => {
		const name = await fill({
			DBRecordData: [9, 10, 11, -1].map((step) => data(`step ${step}`, { trained_count: 1, last_trained_step: step })),
		});
		const most = { max_trained_count: 2 };
		expect((await open(name, most)).length).toBe(4);
		expect(await said(await open(name, { ...most, retrained_interval: 3 }))).toEqual(["step 9", "step -1"]);
	});

	it("follow links as DBRef, as id and collection, as a raw id, as text, and to a document that is in its place", async () => {
		const samples = ["a", "b", "c", "d", "e"].map((text) => sample(text, { advantage: new Double(1) }));
		const ids = samples.map(({ _id }) => _id);
		const task = { _id: new ObjectId(), _class_id: "Task.MCPTask", scores: [new Double(0.25)] };
		const own = { ...sample("f") };
		const name = await fill({
			Record: [
				record([ref(ids[0])], { task: ref(task._id, "Task") }),
				record([{ id: ids[1], collection: "DispatchedSamplingTask" }]),
				record([{ id: ids[2].toHexString(), collection: "DispatchedSamplingTask" }]),
				record([ids[3]]),
				record([ids[4].toHexString()]),
				record([own], { task: { scores: [new Double(0.25)] } }),
			],
			DispatchedSamplingTask: samples,
			Task: [task],
		});
		const rows = await open(name);
		expect(await said(rows)).toEqual(["a", "b", "c", "d", "e", "f"]);
		const last = (await rows.read([5]))[0];
		expect(last instanceof Uint8Array && JSON.parse(Buffer.from(last).toString()).advantages).toEqual({ 1: 0.75 });
	});

	it("follow a link into another collection and another database", async () => {
		const [one, two] = [sample("elsewhere"), sample("in another database")];
		const other = await fill({ DispatchedSamplingTask: [two] });
		const name = await fill({
			Record: [record([ref(one._id, "Samples")]), record([new DBRef("DispatchedSamplingTask", two._id, other)])],
			Samples: [one],
		});
		expect(await said(await open(name))).toEqual(["elsewhere", "in another database"]);
	});

	it("are several where a record's samples part, each with its place", async () => {
		const samples = ["a", "b", "c"].map((text) => sample(text));
		const single = sample("d");
		const document = record(samples.map(({ _id }) => ref(_id)));
		const name = await fill({
			Record: [document, record([ref(single._id)])],
			DispatchedSamplingTask: [...samples, single],
		});
		const rows = await open(name);
		expect(rows.length).toBe(4);
		expect(await said(rows, [3, 1, 0, 2])).toEqual(["d", "b", "a", "c"]);
		expect(rows.location(1)).toBe(`Record ${document._id.toHexString()} (row 2 of 3)`);
		expect([0, 2, 3].map((row) => rows.documentOf(row))).toEqual([0, 0, 1]);
		await client
			.db(name)
			.collection("Record")
			.updateOne({ _id: document._id }, { $pop: { traj: 1 } });
		expect(await said(rows, [0])).toEqual(["changed: the record yields 2 rows now, and yielded 3 when the run began"]);
	});

	it("have the order of their _id, of whatever type each is", async () => {
		const ids = [7, "text", new ObjectId(), new Binary(Buffer.from("0123456789abcdef"), 4), true, new Date(5), -3, "A"];
		const name = await fill({
			DBRecordData: ids.map((_id) => data(String(_id), { _id })),
		});
		const rows = await open(name);
		expect(rows.length).toBe(ids.length);
		const expected = await client.db(name).collection("DBRecordData").find().sort({ _id: 1 }).toArray();
		expect(await said(rows)).toEqual(expected.map(({ messages: [, last] }) => last.content));
	});

	it("are read by index in any order, and a deleted document is reported", async () => {
		const name = await fill({ DBRecordData: Array.from({ length: 700 }, (_, i) => data(`row ${i}`)) });
		const rows = await open(name);
		const shuffled = Array.from({ length: 700 }, (_, i) => (i * 311) % 700);
		expect(await said(rows, shuffled)).toEqual(shuffled.map((i) => `row ${i}`));
		const target = await client.db(name).collection("DBRecordData").findOne({ "messages.1.content": "row 5" });
		await client.db(name).collection("DBRecordData").deleteOne({ _id: target?._id });
		expect(await said(rows, [4, 5])).toEqual(["row 4", "deleted: the document does not exist any more"]);
		expect(rows.location(5)).toBe(`DBRecordData ${target?._id.toHexString()}`);
	});

	it("come whole through a connection that breaks while they are listed and read", async () => {
		const ids = Array.from({ length: 25_000 }, (_, i) => (i % 2 === 0 ? i : `text ${String(i).padStart(6, "0")}`));
		const name = await fill({ DBRecordData: ids.map((_id) => data(`row ${_id}`, { _id })) });
		const url = new URL(server.uriOf(name));
		const way = await cutting(Number(url.port), 300_000, 5);
		url.port = String(way.port);
		const connection = await MongoConnection.open(url.href);
		try {
			const rows = await openDatabaseRows(connection, DEFAULTS);
			expect(rows.length).toBe(25_000);
			expect(rows.location(12_499)).toBe("DBRecordData 24998");
			expect(rows.location(12_500)).toBe("DBRecordData text 000001");
			const listed = way.cut();
			expect(listed).toBeGreaterThan(0);
			const wanted = Array.from({ length: 3000 }, (_, i) => (i * 7919) % 25_000);
			const texts = await said(rows, wanted);
			expect(texts).toEqual(wanted.map((row) => `row ${rows.location(row).slice("DBRecordData ".length)}`));
			expect(way.cut()).toBeGreaterThan(listed);
			expect(connection.notices.some((notice) => notice.includes("responds again"))).toBe(true);
		} finally {
			await connection.close();
			way.close();
		}
	});

	it("that cannot be had are reported with the reason, and the others come all the same", async () => {
		const good = sample("good");
		const loop = new ObjectId();
		const back = { _id: new ObjectId(), traj: [ref(loop, "Record")] };
		const missing = new ObjectId();
		const name = await fill({
			Record: [
				record([ref(missing)]),
				record([ref(good._id)]),
				record([null]),
				record("x"),
				record([]),
				record([ref(loop, "Record")], { _id: loop }),
				record([5.5, ref(good._id)]),
				record([[]]),
				record([ref(good._id)], { task: ref(missing, "Task") }),
				record([ref(good._id)], { score: Number.NaN, task: null }),
			],
			DispatchedSamplingTask: [good],
			Other: [back],
		});
		const rows = await open(name);
		const byReason = new Map((await said(rows)).map((text, i) => [i, text]));
		const texts = [...byReason.values()];
		const hex = missing.toHexString();
		expect(texts).toContain("good");
		expect(texts).toContain(`missing link: \`traj[0]\`: links to DispatchedSamplingTask ${hex}, which does not exist`);
		expect(texts).toContain("missing link: `traj[0]`: is null, and should link to DispatchedSamplingTask");
		expect(texts).toContain("wrong type: `traj`: a string, not an array of links");
		expect(texts).toContain("nothing completed: the trajectory is empty");
		expect(texts).toContain("cycle of links: `traj[0]`: leads back to this record");
		expect(texts).toContain("missing link: `traj[0]`: links to DispatchedSamplingTask 5.5, which does not exist");
		expect(texts).toContain("wrong type: `traj[0]`: is an array, which is not a link to DispatchedSamplingTask");
		expect(texts).toContain(`missing link: \`task\`: links to Task ${hex}, which does not exist`);
		expect(texts).toContain("not finite: `score`: NaN has no JSON text");
	});

	it("name a cycle of records that link to each other", async () => {
		const [a, b] = [new ObjectId(), new ObjectId()];
		const name = await fill({
			Record: [record([ref(b, "Record")], { _id: a }), record([ref(a, "Record")], { _id: b, status: "failed" })],
		});
		expect(await said(await open(name))).toEqual([
			`cycle of links: \`traj[0]\`: leads to the record ${b.toHexString()}, which links back to this one`,
		]);
	});

	it("may be as large as a document can be; a trajectory that is larger still is refused by name", async () => {
		const large = "x".repeat(15 * 1024 * 1024);
		const samples = Array.from({ length: 5 }, (_, i) => sample(`${i} ${large}`));
		const small = sample("small");
		const name = await fill({
			Record: [record(samples.map(({ _id }) => _id)), record([small._id])],
			DispatchedSamplingTask: [small],
		});
		for (const one of samples) await client.db(name).collection("DispatchedSamplingTask").insertOne(one);
		const rows = await open(name, {}, ({ trajectory }) => {
			const contents = trajectory.map((one) => JSON.stringify(one)).join("");
			return { messages: [{ role: "assistant", content: `${contents.length}` }] };
		});
		const [whole] = await said(rows);
		expect(Number(whole)).toBeGreaterThan(5 * large.length);
		await client
			.db(name)
			.collection("Record")
			.updateOne({}, { $set: { traj: Array(18).fill(samples[0]?._id) } });
		const [refused, other] = await said(rows);
		expect(refused).toBe(
			"row too large: the 18 samples of the trajectory have 270 MiB together; at most 256 MiB are read",
		);
		expect(Number(other)).toBeLessThan(1000);
	}, 60_000);

	it("go through a user's function, which gives one row, several or none; what it throws names the record", async () => {
		const samples = ["one", "two", "none", "throws"].map((text) => sample(text));
		const name = await fill({
			Record: samples.map(({ _id }) => record([ref(_id)], { meta_infos: { a: 1 } })),
			DispatchedSamplingTask: samples,
		});
		const rows = await open(name, {}, ({ record: given, trajectory }) => {
			expect(given).toMatchObject({ status: "ready", meta_infos: { a: 1 } });
			const [first] = trajectory as { response: { choices: { message: { content: string } }[] } }[];
			const text = first?.response.choices[0]?.message.content ?? "";
			if (text === "throws") throw new Error("no good");
			const row = (content: string) => ({ messages: [{ role: "assistant" as const, content }] });
			return text === "none" ? [] : text === "two" ? [row("two 1"), row("two 2")] : row(text);
		});
		expect(await said(rows)).toEqual([
			"one",
			"two 1",
			"two 2",
			"conversion failed: the converting function threw: no good",
		]);
		expect(rows.connection.notices).toEqual(["convert_record_to_data_func returns no row for 1 records"]);
	});
});
