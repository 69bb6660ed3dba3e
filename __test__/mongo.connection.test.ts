/** What a run waits for: a server that is away for longer than a network's hiccup, and one that is no primary any more. */
import { MongoServerError } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { MongoConnection } from "../src/mongo/connection.js";
import { errorOf } from "./support/folder.js";
import { killMissing, type MongoServer, mongoMissing, startMongo } from "./support/mongo.js";

describe.skipIf(mongoMissing("a server that is waited for"))("a server that is waited for", () => {
	let server: MongoServer;
	let connection: MongoConnection;
	beforeAll(async () => {
		server = await startMongo();
		connection = await MongoConnection.open(server.uri);
	});
	afterAll(async () => {
		await connection?.close();
		await server?.stop();
	});
	const ping = () => connection.db.command({ ping: 1 });

	it.each([
		["is no primary any more", 10107],
		["is being elected", 189],
		["steps down", 11602],
		["shuts down", 91],
	])("%s: the request is made again, and reported", async (_, code) => {
		let refused = 0;
		const answer = await connection.attempt("reading", async () => {
			if (refused++ < 2) throw new MongoServerError({ message: "not primary", code });
			return ping();
		});
		expect(answer).toMatchObject({ ok: 1 });
		expect(refused).toBe(3);
		expect(connection.notices.splice(0)).toEqual([
			expect.stringContaining("retrying for up to"),
			expect.stringContaining("responds again"),
		]);
	});

	it("refuses for good: reported at once", async () => {
		let asked = 0;
		const error = await errorOf(
			connection.attempt("reading", async () => {
				asked += 1;
				throw new MongoServerError({ message: "not authorized", code: 13 });
			}),
		);
		expect(error.message).toContain("while reading");
		expect(asked).toBe(1);
	});

	it.skipIf(killMissing("a server that is away for 30 s"))(
		"is away for 30 s: the request ends well",
		async () => {
			await ping();
			await server.kill();
			let answered = false;
			const answering = connection.attempt("reading", ping).finally(() => {
				answered = true;
			});
			await new Promise((resolve) => setTimeout(resolve, 30_000));
			expect(answered).toBe(false);
			await server.restart();
			// Whether the driver or the connection has waited is not distinguished: each does for a part of the time.
			expect(await answering).toMatchObject({ ok: 1 });
		},
		90_000,
	);
});
