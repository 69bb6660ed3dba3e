/** Rows that are no documents: each is named with what is wrong, and nothing is written. */
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { chat, check, fresh, importFile, rowsFile } from "./support/import.js";
import { type MongoServer, mongoMissing, startMongo } from "./support/mongo.js";

const folder = temporaryFolder();
const file = (rows: string[]) => rowsFile(folder, rows);

describe("a check before the import", () => {
	it.each([
		["[1]", "DBRecordData", "shape", /an array/],
		['{"prompt":"a","completion":"b"}', "DBRecordData", "no messages", /prompt, completion/],
		['{"messages":[]}', "DBRecordData", "no messages", /empty/],
		['{"messages":[{"role":"robot"}]}', "DBRecordData", "unknown role", /messages\[0\].*robot/],
		[chat("a", ',"advantages":{"0":1}'), "DBRecordData", "bad index", /message 0/],
		[chat("a", ',"scores":{"1":"x"}'), "DBRecordData", "bad field", /scores\[1\]/],
		[chat("a", ',"_id":1'), "DBRecordData", "bad field", /_id/],
		[chat("a", ',"a.b":1'), "DBRecordData", "bad field", /a\.b/],
		[chat("a", ',"reward":"x"'), "DBRecordData", "bad field", /reward/],
		[chat("a", ',"x":{"a\\u0000":1}'), "DBRecordData", "bad field", /U\+0000/],
		["{", "DBRecordData", "not json", /not JSON/],
		['{"messages":[{"role":"user","content":"\\ud800"}]}', "DBRecordData", "lone surrogate", /d800/],
		['{"messages":[{"role":"user","content":"a"}]}', "Record", "no targets", /trained/],
		[chat("a").replace("}]", '},{"role":"user","content":"b"}]'), "Record", "not a Record", /1 messages follow/],
		[chat("a", ',"chat_template_kwargs":{"a":1}'), "Record", "not a Record", /chat_template_kwargs/],
		[chat("a", ',"system":"Be brief."'), "Record", "not a Record", /system/],
		[chat("a", ',"functions":[{"name":"f"}]'), "Record", "not a Record", /functions/],
		[chat("a", ',"images":["x.png"]'), "Record", "not a Record", /images/],
		[chat("a", ',"kto_tag":false'), "Record", "not a Record", /kto_tag/],
	] as const)("names the row that cannot be one: %s as %s", async (row, kind, reason, message) => {
		const bad = await check(file([chat("fine"), row]), { kind });
		expect(bad).toMatchObject([{ row: 1, reason }]);
		expect(bad[0]?.location).toMatch(/rows\.jsonl:2$/);
		expect(bad[0]?.message).toMatch(message);
	});

	it("takes such keys where they say nothing, and as DBRecordData, which has a place for them", async () => {
		const empty = chat("a", ',"chat_template_kwargs":{},"system":"","functions":[],"images":null');
		expect(await check(file([empty]), { kind: "Record" })).toEqual([]);
		const full = chat("a", ',"chat_template_kwargs":{"a":1},"system":"Be brief.","images":["x.png"]');
		expect(await check(file([full]), { kind: "DBRecordData" })).toEqual([]);
	});
});

describe.skipIf(mongoMissing("the largest document"))("the largest document", () => {
	let server: MongoServer;
	beforeAll(async () => {
		server = await startMongo();
	});
	afterAll(() => server.stop());

	it(
		"is taken, and one byte more is refused by name",
		() =>
			fresh(server, async (connection) => {
				const size = async (text: string) => {
					await importFile(connection, file([chat(text)]));
					const [bytes] = await connection.db.collection("DBRecordData").find({}, { raw: true }).toArray();
					return bytes?.length;
				};
				const overhead = Number(await size("x")) - 1;
				const most = 16 * 1024 * 1024 - 1;
				expect(await check(file([chat("x".repeat(most - overhead))]))).toEqual([]);
				const [bad] = await check(file([chat("x".repeat(most - overhead + 1))]));
				expect(bad).toMatchObject({ reason: "too large" });
				expect(bad?.message).toContain(`${most + 1} bytes`);
				const path = file([
					chat("x".repeat(most - overhead)),
					chat("y".repeat(9_000_000)),
					chat("z".repeat(9_000_000)),
				]);
				expect(await importFile(connection, path)).toMatchObject({ written: 3 });
			}),
		60_000,
	);
});
