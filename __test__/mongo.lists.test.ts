/** The files of documents in a run's folder. No server is needed. */
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setImmediate } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { DocumentList, type Listed } from "../src/mongo/document-list.js";
import { LeaseLog } from "../src/mongo/lease-log.js";
import { type ListKind, listsIn, readList } from "../src/mongo/list-file.js";
import { keepSnapshot } from "../src/mongo/snapshot.js";
import { errorOf, temporaryFolder } from "./support/folder.js";

const folder = temporaryFolder();
let runs = 0;

/** A run's folder with one file of documents in it. */
function runWith(kind: ListKind, text: string): string {
	const out = join(folder, `run-${runs++}`);
	mkdirSync(join(out, ".arl-rows"), { recursive: true });
	writeFileSync(join(out, ".arl-rows", `0a.${kind}`), text);
	return out;
}

function listed(type: number, hex: string, rows: number, trainedCount: number): Listed {
	const bytes = Buffer.from(hex, "hex");
	return { id: { type, bytes, at: 0, end: bytes.length }, rows, trainedCount };
}

const DOCUMENTS = [listed(7, "64f000000000000000000001", 1, 0), listed(2, "0400000061626300", 3, 2)];
const LINES = "7 64f000000000000000000001 1 0\n2 0400000061626300 3 2\n";
const HEADER = '{"version":1,"id":"0a","database":"db","collection":"Record"';
const IDS = `${HEADER},"documents":2}\n${LINES}`;
const LOG = `${HEADER}}\n${LINES}`;

/** A list's documents as lines. */
function linesOf(documents: DocumentList): string {
	return Array.from({ length: documents.length }, (_, i) => {
		const { id, rows, trainedCount } = documents.at(i);
		return `${id.type} ${id.bytes.toString("hex", id.at, id.end)} ${rows} ${trainedCount}\n`;
	}).join("");
}

describe("the list of a run's documents", () => {
	it("is written in the format of earlier versions, and read from it", async () => {
		const documents = new DocumentList();
		for (const document of DOCUMENTS) documents.push(document);
		const out = join(folder, "new");
		await keepSnapshot(out, { id: "0a", database: "db", collection: "Record", documents });
		expect(readFileSync(join(out, ".arl-rows", "0a.ids"), "utf8")).toBe(IDS);
		const list = await readList(["nowhere", runWith("ids", IDS)], "ids", "0a");
		expect(list).toMatchObject({ id: "0a", database: "db", collection: "Record" });
		expect(linesOf(list.documents)).toBe(LINES);
	});

	it.each([
		["a document is missing", IDS.slice(0, IDS.indexOf("2 04"))],
		["the last line is torn", IDS.slice(0, -3)],
		["a line is garbled", IDS.replace("7 64", "7 6g")],
		["the header is garbled", IDS.slice(1)],
		["a later version wrote it", IDS.replace('"version":1', '"version":2')],
		["it is empty", ""],
	])("is refused as damaged where %s", async (_, text) => {
		const out = runWith("ids", text);
		const error = await errorOf(readList([out], "ids", "0a"));
		expect(error).toMatchObject({ code: "ARL_STATE" });
		expect(error.message).toBe(`${join(out, ".arl-rows", "0a.ids")}: the list of this run's documents is damaged`);
	});

	it("that is missing is reported with the places where it may be", async () => {
		const error = await errorOf(readList(["one", "two"], "ids", "0a"));
		expect(error).toMatchObject({ code: "ARL_STATE" });
		expect(error.message).toContain("is missing: one/.arl-rows/0a.ids, nor two/.arl-rows/0a.ids");
	});
});

describe("the log of a run's leases", () => {
	it("is read from the files of earlier versions, without a line that was torn", async () => {
		const log = await LeaseLog.read([runWith("claims", `${LOG}counted 4\ncounted 2\n0  5 0\n7 64f0`)], "0a");
		expect(linesOf(log.documents)).toBe(`${LINES}0  5 0\n`);
		expect(log.counted).toBe(4);
		expect(log.rows).toBe(9);
		expect([0, 1, 2].map((i) => log.isDocument(i))).toEqual([true, true, false]);
	});

	it("has what was leased before, while and after its file was written, and replaces those of earlier runs", async () => {
		const out = runWith("claims", LOG.replace('"0a"', '"0b"'));
		writeFileSync(join(out, ".arl-rows", "0b.ids.partial"), "left by a kill");
		const log = new LeaseLog("0c", "db", "Record");
		log.push(DOCUMENTS[0] as Listed);
		let isWritten = false;
		const begun = log.begin(out).then(() => {
			isWritten = true;
		});
		while (!isWritten) {
			log.push(DOCUMENTS[1] as Listed);
			await setImmediate();
		}
		await begun;
		log.pushNone(5);
		log.noteCounted(3);
		log.sync();
		await log.close();
		expect(readdirSync(join(out, ".arl-rows"))).toEqual(["0c.claims"]);
		expect(await listsIn(out, "claims")).toEqual(["0c"]);
		const read = await LeaseLog.read([out], "0c");
		expect(read.documents.length).toBeGreaterThan(3);
		expect(linesOf(read.documents)).toBe(linesOf(log.documents));
		expect(read.counted).toBe(3);
	});
});
