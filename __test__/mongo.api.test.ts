/** The entry `arl/mongo`, as a user's code calls it. */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { databaseStatus, exportRows, importRows, MongoRows } from "../src/api/mongo.js";
import type { RecordData } from "../src/data/index.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { chat, rowsFile } from "./support/import.js";
import { type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";

const folder = temporaryFolder();

function row(text: string): RecordData {
	return JSON.parse(chat(text));
}

describe.skipIf(mongoMissing("the entry arl/mongo"))("the entry arl/mongo", () => {
	let server: MongoServer;
	beforeAll(async () => {
		server = await startMongo();
	}, 60_000);
	afterAll(() => server.stop());

	it("imports rows of code once, counts them, and reads them by index and in order", async () => {
		const db_connection_string = server.uriOf(newDatabase());
		const rows = Array.from({ length: 150 }, (_, i) => row(`reply ${i}`));
		const seen: number[] = [];
		const first = await importRows({ db_connection_string, rows, split: "train", progress: (done) => seen.push(done) });
		expect(first).toMatchObject({ written: 150, present: 0, bad: [], documents: { DBRecordData: 150 } });
		expect(seen.at(-1)).toBe(150);
		expect(await importRows({ db_connection_string, rows: rows.values() })).toMatchObject({ written: 0, present: 150 });
		const status = await databaseStatus({ db_connection_string });
		expect(status.collections.DBRecordData).toMatchObject({ documents: 150, trainable: { train: 150 } });

		await using opened = await MongoRows.open({ db_connection_string });
		expect(opened).toMatchObject({ length: 150, name: expect.stringContaining(".DBRecordData") });
		expect(await opened.get(7)).toMatchObject(rows[7] as RecordData);
		const read: RecordData[] = [];
		for await (const one of opened) read.push(one);
		expect(read.map(({ messages }) => messages)).toEqual(rows.map(({ messages }) => messages));
	});

	it("imports files as records, chooses rows by the options of the configuration, and exports them", async () => {
		const db_connection_string = server.uriOf(newDatabase());
		const file = rowsFile(folder, [chat("one", ',"reward":1.0'), chat("two", ',"reward":2.5'), chat("three")]);
		await importRows({ db_connection_string, rows: file, as: "Record", split: "valid" });
		const out = join(folder, "out.jsonl");
		expect((await errorOf(exportRows({ db_connection_string, out }))).code).toBe("ARL_DATA");
		const db_match = { score: { $gt: 2 } };
		const exported = await exportRows({ db_connection_string, out, split: "valid", db_match });
		expect(exported).toEqual({ rows: 1, bad: [] });
		expect(readFileSync(out, "utf8")).toContain('"reward":2.5');
		await using converted = await MongoRows.open({
			db_connection_string,
			split: null,
			convert_record_to_data_func: ({ trajectory }) => [row("a"), row(String(trajectory.length))],
		});
		expect(converted.length).toBe(6);
		expect((await converted.get(1)).messages.at(-1)?.content).toBe("1");
	});

	it("refuses rows that cannot be imported, or leaves them out", async () => {
		const db_connection_string = server.uriOf(newDatabase());
		const rows = [row("good"), { messages: [] } as RecordData, null as unknown as RecordData];
		const error = await errorOf(importRows({ db_connection_string, rows }));
		expect(error.message).toContain("train_dataset[1]: no messages");
		expect(error.message).toContain("train_dataset[2]: not a row");
		const { written, bad } = await importRows({ db_connection_string, rows, on_bad_row: "skip" });
		expect(written).toBe(1);
		expect(bad.map(({ location }) => location)).toEqual(["train_dataset[1]", "train_dataset[2]"]);
		const out = join(folder, "none.jsonl");
		expect((await errorOf(exportRows({ db_connection_string, out, split: "test" }))).code).toBe("ARL_DATA");
		expect(existsSync(out)).toBe(false);
	});
});
