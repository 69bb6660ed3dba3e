/** An import that is killed, or whose server is: the rows are in once in the end, in their order. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Collection, MongoClient } from "mongodb";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { killMissing, type MongoServer, startMongo } from "./support/mongo.js";
import { arl } from "./support/real.js";

const folder = temporaryFolder();
const ROWS = 20_000;

describe.skipIf(killMissing("an import that is broken off"))("an import that is broken off", () => {
	let server: MongoServer;
	let client: MongoClient;
	let rows: Collection;
	let words: string[];
	const texts = Array.from({ length: ROWS }, (_, i) => `text ${i}`);
	beforeAll(async () => {
		server = await startMongo();
		client = new MongoClient(server.uri);
		rows = client.db().collection("DBRecordData");
		const path = join(folder, "many.jsonl");
		const row = (text: string) => JSON.stringify({ messages: [{ role: "assistant", content: text }] });
		writeFileSync(path, texts.map((text) => `${row(text)}\n`).join(""));
		// The driver itself waits a little for a server; here only so long, that it is the program that waits.
		const uri = `${server.uri}?serverSelectionTimeoutMS=300`;
		words = ["mongo", "import", path, "--db_connection_string", uri, "--json"];
	});
	beforeEach(() => rows.deleteMany({}));
	afterAll(async () => {
		await client.close();
		await server.stop();
	});

	async function begun(): Promise<void> {
		while ((await rows.findOne({}, { projection: { _id: 1 } })) === null)
			await new Promise((resolve) => setTimeout(resolve, 5));
	}

	async function stored(): Promise<string[]> {
		const found = await rows
			.find({}, { projection: { "messages.content": 1 } })
			.sort({ _id: 1 })
			.toArray();
		return found.map(({ messages }) => messages[0].content);
	}

	it("by kill -9 goes on when the same command is given again", async () => {
		const first = await arl(words, async (kill) => {
			await begun();
			kill("SIGKILL");
		});
		expect(first.signal).toBe("SIGKILL");
		const there = await rows.countDocuments();
		expect(there).toBeLessThan(ROWS);
		const second = await arl(words);
		expect(JSON.parse(second.stdout)).toMatchObject({ rows: ROWS, written: ROWS - there, present: there });
		expect(await stored()).toEqual(texts);
	}, 60_000);

	it("by kill -9 of the server waits for it, says so, and goes on", async () => {
		const { code, stdout, stderr } = await arl(words, async () => {
			await begun();
			await server.kill();
			await new Promise((resolve) => setTimeout(resolve, 1500));
			await server.restart();
		});
		expect({ code, stderr }).toMatchObject({ code: 0 });
		expect(stderr).toContain("retrying for up to");
		expect(stderr).toContain("responds again");
		expect(JSON.parse(stdout)).toMatchObject({ rows: ROWS });
		expect(await stored()).toEqual(texts);
	}, 60_000);
});
