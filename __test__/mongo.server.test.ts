/** The server that the other tests of MongoDB stand on: what it acknowledged is there after a kill -9. */
import { MongoClient } from "mongodb";
import { describe, expect, it } from "vitest";
import { killMissing, startMongo } from "./support/mongo.js";

describe.skipIf(killMissing("the server of the tests"))("the server of the tests", () => {
	it("keeps what it acknowledged when it is killed, and comes back at the same port", async () => {
		const server = await startMongo();
		const client = new MongoClient(server.uri);
		try {
			const rows = client.db().collection("rows");
			await rows.insertMany(Array.from({ length: 50 }, (_, n) => ({ n })));
			await server.kill();
			await server.restart();
			expect(await rows.countDocuments()).toBe(50);
		} finally {
			await client.close();
			await server.stop();
		}
	});

	it("gives every start a database of its own", async () => {
		const [a, b] = await Promise.all([startMongo(), startMongo()]);
		try {
			expect(new URL(a.uri).pathname).not.toBe(new URL(b.uri).pathname);
		} finally {
			await Promise.all([a.stop(), b.stop()]);
		}
	});
});
