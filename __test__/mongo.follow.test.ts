/** Rows that arrive during a run: each is leased by one run, trained once, and released or counted in the end. */
import { cpSync, existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { setTimeout as pause } from "node:timers/promises";
import { DBRef, type Document, MongoClient, ObjectId } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { valueKey } from "../src/mongo/bson-json.js";
import { MongoConnection } from "../src/mongo/connection.js";
import { Leases } from "../src/mongo/leases.js";
import { temporaryFolder } from "./support/folder.js";
import { documentsOf, going, LEASE_SECONDS, lastCheckpoint, logged, options, until } from "./support/follow.js";
import { killMissing, type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";
import { arl, differingFiles, metricsOf, type Place, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const EXIT_STATE = 3;

describe.skipIf(mongoMissing("following a database"))("following a database", () => {
	let server: MongoServer;
	let client: MongoClient;
	beforeAll(async () => {
		process.env.ARL_TEST_FOLLOW_LEASE = String(LEASE_SECONDS);
		server = await startMongo();
		client = await new MongoClient(server.uri).connect();
	});
	afterAll(async () => {
		delete process.env.ARL_TEST_FOLLOW_LEASE;
		await client?.close();
		await server?.stop();
	});

	/** A new database, the words of a run that follows it, and its rows. */
	function fresh() {
		const name = newDatabase();
		const rows = client.db(name).collection("DBRecordData");
		const words = ["--db_connection_string", server.uriOf(name), "--db_source", "DBRecordData", "--follow"];
		const state = async () => {
			const found = await rows.find().sort({ _id: 1 }).toArray();
			return {
				counts: found.map(({ trained_count: count }) => count ?? 0),
				leased: found.filter((row) => "arl_claim" in row).length,
				marked: found.filter((row) => "arl_acks" in row).length,
			};
		};
		return { rows, words: ["train", ...words], state };
	}

	/** A run on a file in its order, that the same rows from a database are compared with. */
	async function fromFile(place: Place, more: Record<string, string | number> = {}): Promise<Place> {
		const own = { ...place, out: `${place.out}-file` };
		const run = await arl(["train", "--train_file", place.file, ...options(own, { num_train_epochs: 1, ...more })]);
		expect(run.code, run.stderr).toBe(0);
		return own;
	}

	it.each(["ack", "agentrl"])(
		"trains rows that are there and rows that come, with the bits of a file, and what is left when none comes (%s)",
		async (mode) => {
			const place = tinyPlace(folder, 14);
			const file = await fromFile(place);
			const documents = documentsOf(place.file);
			const { rows, words, state } = fresh();
			await rows.insertMany(documents.slice(0, 5));
			const more = { max_steps: 50, follow_idle: 3, mongo_write_back: mode };
			const run = going([...words, ...options(place, more)]);
			await until("the first step is saved", async () => (await rows.countDocuments({ arl_claim: { $ne: null } })) > 0);
			await pause(1500);
			await rows.insertMany(documents.slice(5));
			const { code, stderr } = await run.ended;
			expect(code, stderr).toBe(0);
			expect(logged(place.out)).toEqual(logged(file.out));
			expect(differingFiles(`${place.out}/checkpoint-4`, `${file.out}/checkpoint-4`)).toEqual([]);
			expect(await state()).toEqual({ counts: Array.from({ length: 14 }, () => 1), leased: 0, marked: 0 });
		},
	);

	it("leases belong to one run each, however many ask at once, and an expired one is left alone after an interruption", async () => {
		const database = newDatabase();
		const rows = client.db(database).collection("DBRecordData");
		await rows.insertMany(Array.from({ length: 300 }, () => ({ split: "train" })));
		const connection = await MongoConnection.open(server.uriOf(database));
		const selection = { collection: "DBRecordData" as const, filter: { split: "train" } };
		const leasesOf = (owner: string, leaseMs = 60_000) => new Leases(connection, selection, owner, leaseMs);
		const got = await Promise.all(
			["a", "b", "c", "d", "e", "f"].map(async (owner) => {
				const leases = leasesOf(owner);
				const taken: string[] = [];
				for (let i = 0; i < 60; i++) taken.push(...(await leases.take(7, true)).map(({ id }) => valueKey(id)));
				return taken;
			}),
		);
		expect(got.flat()).toHaveLength(300);
		expect(new Set(got.flat()).size).toBe(300);
		expect(got.filter((taken) => taken.length > 0).length).toBeGreaterThan(1);

		await rows.deleteMany({});
		await rows.insertMany([{ split: "train" }, { split: "train" }, { split: "valid" }]);
		const leaseMs = 1500;
		const [awake, other] = [leasesOf("awake", leaseMs), leasesOf("other", leaseMs)];
		const held = await awake.take(9, true);
		expect(held).toHaveLength(2);
		await pause(leaseMs + 200);
		// Neither has reached the server for longer than the lease: its owner gets the time to extend it.
		expect(await other.take(9, true)).toEqual([]);
		expect((await awake.extend(held.map(({ id }) => id))).size).toBe(0);
		let taken: unknown[] = [];
		await until("the lease has run out", async () => {
			taken = await other.take(9, true);
			return taken.length > 0;
		});
		expect(taken).toHaveLength(2);
		expect((await awake.extend(held.map(({ id }) => id))).size).toBe(2);
		await connection.close();
	});

	it("two runs at once train every row once between them", async () => {
		// So many that neither is through before the other has begun.
		const place = tinyPlace(folder, 240);
		const documents = documentsOf(place.file);
		const { rows, words, state } = fresh();
		await rows.insertMany(documents.slice(0, 200));
		const more = { max_steps: 100, follow_idle: 4, save_steps: 1, save_total_limit: 1 };
		const outs = [`${place.out}-1`, `${place.out}-2`];
		const runs = outs.map((out) => going([...words, ...options({ ...place, out }, more)]));
		await until("one has begun", async () => (await rows.countDocuments({ trained_count: 1 })) > 0);
		await rows.insertMany(documents.slice(200));
		for (const { ended } of runs) expect((await ended).code, (await ended).stderr).toBe(0);
		expect(await state()).toEqual({ counts: Array.from({ length: 240 }, () => 1), leased: 0, marked: 0 });
		const ledger = await client.db(rows.dbName).collection("arl_acks").find().toArray();
		const trained = ledger.flatMap((entry) => entry.documents.map(String));
		expect(trained.sort()).toEqual(documents.map(({ _id }) => String(_id)).sort());
		expect(new Set(ledger.map((entry) => entry.run)).size).toBe(2);
	}, 60_000);

	it("the rows of a run that was killed go to another; the killed run goes on without them, and tells", async () => {
		const place = tinyPlace(folder, 26);
		const documents = documentsOf(place.file);
		const { rows, words, state } = fresh();
		await rows.insertMany(documents.slice(0, 22));
		const killed = going([...words, ...options(place, { max_steps: 10 })]);
		// Five steps are trained, of which four are saved; of the last two rows no step can be made.
		await until("four steps count", async () => (await state()).counts.filter((count) => count === 1).length === 16);
		await until("six rows are held", async () => (await state()).leased === 6);
		killed.kill("SIGKILL");
		await killed.ended;
		const other = { ...place, out: `${place.out}-other` };
		const second = await arl([...words, ...options(other, { max_steps: 10, follow_idle: LEASE_SECONDS + 4 })]);
		expect(second.code, second.stderr).toBe(0);
		expect((await state()).counts).toEqual(Array.from({ length: 22 }, () => 1));
		expect(metricsOf(other.out)).toHaveLength(2);
		// Killed after leasing and before logging: such a row is released first.
		const [list] = readdirSync(`${place.out}/.arl-rows`);
		const lease = { owner: list?.split(".")[0], until: new Date(Date.now() + 1e6), at: new Date() };
		await rows.insertMany(documents.slice(22).map((row, i) => (i === 1 ? { ...row, arl_claim: lease } : row)));
		const again = [
			...words,
			...options(place, { max_steps: 10, follow_idle: 2 }),
			"--resume_from_checkpoint",
			"latest",
		];
		const resumed = await arl(again);
		expect(resumed.code, resumed.stderr).toBe(0);
		expect(resumed.stderr + resumed.stdout).toContain(
			"6 rows that this run had leased and not trained went to another",
		);
		expect(await state()).toEqual({ counts: Array.from({ length: 26 }, () => 1), leased: 0, marked: 0 });
		const lines = readFileSync(place.file, "utf8").trimEnd().split("\n");
		writeFileSync(place.file, `${[...lines.slice(0, 16), ...lines.slice(22)].join("\n")}\n`);
		const file = await fromFile(place);
		expect(logged(place.out)).toEqual(logged(file.out));
		expect(differingFiles(`${place.out}/checkpoint-5`, `${file.out}/checkpoint-5`)).toEqual([]);
	}, 90_000);

	it("goes on at the exact row after kill -9, with the bits of a run that was never killed", async () => {
		const place = tinyPlace(folder, 30);
		const file = await fromFile(place, { save_steps: 1 });
		for (const kill of [0, 2, 5]) {
			const out = `${place.out}-${kill}`;
			const { rows, words, state } = fresh();
			await rows.insertMany(documentsOf(place.file));
			const more = { max_steps: 50, follow_idle: 2, save_steps: 1 };
			const run = going([...words, ...options({ ...place, out }, more)]);
			const begun = () =>
				existsSync(`${out}/.arl-rows`) && readdirSync(`${out}/.arl-rows`).some((n) => n.endsWith(".claims"));
			await until("it has begun", begun);
			await until(`${kill} steps are saved`, () => lastCheckpoint(out) >= kill);
			run.kill("SIGKILL");
			await run.ended;
			const words2 = [...words, ...options({ ...place, out }, more), "--resume_from_checkpoint", "latest"];
			const resumed = await arl(words2);
			expect(resumed.code, resumed.stderr).toBe(0);
			expect(logged(out)).toEqual(logged(file.out));
			expect(differingFiles(`${out}/checkpoint-8`, `${file.out}/checkpoint-8`)).toEqual([]);
			expect(await state()).toEqual({ counts: Array.from({ length: 30 }, () => 1), leased: 0, marked: 0 });
		}
	}, 90_000);

	it("gives back what is not trained when it is interrupted, and goes on with it, also from an older checkpoint", async () => {
		const place = tinyPlace(folder, 18);
		const file = await fromFile(place);
		const documents = documentsOf(place.file);
		const { rows, words, state } = fresh();
		await rows.insertMany(documents.slice(0, 14));
		const run = going([...words, ...options(place, { max_steps: 10 })]);
		await until("two rows wait", async () => {
			const { counts, leased } = await state();
			return counts.filter((count) => count === 1).length === 8 && leased === 6;
		});
		run.kill("SIGINT");
		const stopped = await run.ended;
		expect(stopped.code, stopped.stderr).toBe(130);
		const counts = Array.from({ length: 14 }, (_, i) => (i < 12 ? 1 : 0));
		expect(await state()).toEqual({ counts, leased: 0, marked: 0 });
		await rows.insertMany(documents.slice(14));
		const older = { ...place, out: `${place.out}-older` };
		cpSync(place.out, older.out, { recursive: true });
		const more = { max_steps: 10, follow_idle: 2 };
		const words2 = [...words, ...options(place, more), "--resume_from_checkpoint", "latest"];
		const resumed = await arl(words2);
		expect(resumed.code, resumed.stderr).toBe(0);
		expect(logged(place.out)).toEqual(logged(file.out));
		expect(differingFiles(`${place.out}/checkpoint-5`, `${file.out}/checkpoint-5`)).toEqual([]);
		const all = Array.from({ length: 18 }, () => 1);
		expect(await state()).toEqual({ counts: all, leased: 0, marked: 0 });
		// What the earlier part has counted is its own for good: step 3 comes again in bits, and counts once.
		const from = ["--resume_from_checkpoint", `${older.out}/checkpoint-2`];
		const back = await arl([...words, ...options(older, { ...more, max_steps: 3 }), ...from]);
		expect(back.code, back.stderr).toBe(0);
		expect(differingFiles(`${older.out}/checkpoint-3`, `${place.out}/checkpoint-3`)).toEqual([]);
		expect(await state()).toEqual({ counts: all, leased: 0, marked: 0 });
	}, 60_000);

	it("a run that ended because nothing came goes on when something has come", async () => {
		const place = tinyPlace(folder, 12);
		const documents = documentsOf(place.file);
		const { rows, words, state } = fresh();
		await rows.insertMany(documents.slice(0, 6));
		const more = { max_steps: 10, follow_idle: 1 };
		expect((await arl([...words, ...options(place, more)])).code).toBe(0);
		expect(metricsOf(place.out)).toHaveLength(2);
		const again = [...words, ...options(place, more), "--resume_from_checkpoint", "latest"];
		const nothing = await arl(again);
		expect(nothing.code).toBe(3);
		expect(nothing.stderr).toContain("no row has come within 1 s (follow_idle)");
		for (const upTo of [11, 12]) {
			await rows.insertMany(documents.slice(upTo === 11 ? 6 : 11, upTo));
			const resumed = await arl(again);
			expect(resumed.code, resumed.stderr).toBe(0);
			expect(await state()).toEqual({ counts: Array.from({ length: upTo }, () => 1), leased: 0, marked: 0 });
		}
		expect(metricsOf(place.out).map(({ step }) => step)).toEqual([1, 2, 3, 4, 5]);
		const steps = (await rows.find().sort({ _id: 1 }).toArray()).map((row) => row.last_trained_step);
		expect(steps).toEqual([1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 5]);
	}, 60_000);

	it("a run that slept for longer than its lease ends where it lost a row, and goes on from its checkpoint", async () => {
		const place = tinyPlace(folder, 10);
		const { rows, words, state } = fresh();
		await rows.insertMany(documentsOf(place.file));
		const sleeper = going([...words, ...options(place, { max_steps: 10 })]);
		await until("two rows wait", async () => {
			const { counts, leased } = await state();
			return counts.filter((count) => count === 1).length === 8 && leased === 2;
		});
		sleeper.kill("SIGSTOP");
		const other = { ...place, out: `${place.out}-other` };
		const second = await arl([...words, ...options(other, { max_steps: 10, follow_idle: LEASE_SECONDS + 4 })]);
		expect(second.code, second.stderr).toBe(0);
		sleeper.kill("SIGCONT");
		const { code, stderr } = await sleeper.ended;
		expect(code).toBe(EXIT_STATE);
		expect(stderr).toContain("this run has lost its leases of 2 rows");
		expect(await state()).toEqual({ counts: Array.from({ length: 10 }, () => 1), leased: 0, marked: 0 });
		const late = documentsOf(tinyPlace(folder, 11).file).slice(10);
		await rows.insertMany(late);
		const more = { max_steps: 10, follow_idle: 1 };
		const resumed = await arl([...words, ...options(place, more), "--resume_from_checkpoint", "latest"]);
		expect(resumed.code, resumed.stderr).toBe(0);
		expect(metricsOf(place.out)).toHaveLength(3);
		expect((await state()).counts).toEqual(Array.from({ length: 11 }, () => 1));
		// At max_steps there is nothing left to do, and nothing to wait for.
		const done = [...words, ...options(place, { ...more, max_steps: 3 }), "--resume_from_checkpoint", "latest"];
		const over = await arl(done);
		expect(over.code, over.stderr).toBe(0);
	}, 60_000);

	it("waits for the first row, and leaves nothing behind when it is interrupted before", async () => {
		const place = tinyPlace(folder, 4);
		const { words } = fresh();
		const run = going([...words, ...options(place, { max_steps: 10 })]);
		await until("it waits", () => existsSync(place.out));
		await pause(1500);
		run.kill("SIGINT");
		const { code, stderr, stdout } = await run.ended;
		expect(code, stderr).toBe(130);
		expect(stderr + stdout).toContain("is followed");
		expect(existsSync(place.out)).toBe(false);
		const either = words.filter((word) => !["--db_source", "DBRecordData"].includes(word));
		const unsaid = await arl([...either, ...options(place, { max_steps: 10 })]);
		expect(unsaid.code).toBe(2);
		expect(unsaid.stderr).toContain("no collection to follow was chosen");
	});

	it("trains records whose samples are several rows each, also where a checkpoint is in the middle of one", async () => {
		const place = tinyPlace(folder, 18);
		const lines = readFileSync(place.file, "utf8").trimEnd().split("\n");
		const name = newDatabase();
		const samples = lines.map((line) => {
			const messages = JSON.parse(line).messages.slice(0, -1);
			const reply = { role: "assistant", content: "Yes." };
			const response = { choices: [{ message: reply, logprobs: null }] };
			return {
				_id: new ObjectId(),
				status: "completed",
				req_type: "chatcompletions",
				request: [{ messages }],
				response,
			};
		});
		await client.db(name).collection<Document>("DispatchedSamplingTask").insertMany(samples);
		const records = Array.from({ length: 6 }, (_, i) => ({
			traj: samples.slice(i * 3, i * 3 + 3).map(({ _id }) => new DBRef("DispatchedSamplingTask", _id)),
			...{ status: "ready", split: "train", score: 1, trained_count: 0, last_trained_step: -1 },
		}));
		const collection = client.db(name).collection("Record");
		await collection.insertMany(records);
		const uri = ["--db_connection_string", server.uriOf(name)];
		const exported = await arl(["mongo", "export", ...uri, "--out", place.file, "--overwrite"]);
		expect(exported.code, exported.stderr).toBe(0);
		expect(readFileSync(place.file, "utf8").trimEnd().split("\n")).toHaveLength(18);
		const file = await fromFile(place, { save_steps: 1 });
		const more = { max_steps: 10, follow_idle: 2, save_steps: 1 };
		const run = going(["train", ...uri, "--follow", ...options(place, more)]);
		await until("a step is saved", () => lastCheckpoint(place.out) >= 1);
		run.kill("SIGKILL");
		await run.ended;
		const resumed = await arl([
			"train",
			...uri,
			"--follow",
			...options(place, more),
			"--resume_from_checkpoint",
			"latest",
		]);
		expect(resumed.code, resumed.stderr).toBe(0);
		expect(logged(place.out)).toEqual(logged(file.out));
		expect(differingFiles(`${place.out}/checkpoint-5`, `${file.out}/checkpoint-5`)).toEqual([]);
		const left = await collection.find().toArray();
		expect(left.map((row) => row.trained_count)).toEqual([1, 1, 1, 1, 1, 1]);
		expect(left.some((row) => "arl_claim" in row || "arl_acks" in row)).toBe(false);
	}, 60_000);
});

describe.skipIf(killMissing("a server that goes while runs follow it"))(
	"a server that goes while runs follow it",
	() => {
		it("for longer than a lease: no run takes the rows of another, and nothing is trained twice", async () => {
			process.env.ARL_TEST_FOLLOW_LEASE = String(LEASE_SECONDS);
			const server = await startMongo();
			try {
				const place = tinyPlace(folder, 210);
				const documents = documentsOf(place.file);
				const client = await new MongoClient(server.uri).connect();
				const rows = client.db().collection("DBRecordData");
				await rows.insertMany(documents.slice(0, 200));
				const outs = [`${place.out}-1`, `${place.out}-2`];
				const words = ["train", "--db_connection_string", server.uri, "--db_source", "DBRecordData", "--follow"];
				const more = { max_steps: 100, follow_idle: 8, save_steps: 1, save_total_limit: 1 };
				const runs = outs.map((out) => going([...words, ...options({ ...place, out }, more)]));
				const owners = () => rows.distinct("arl_claim.owner");
				await until("both have rows", async () => (await owners()).length === 2);
				await server.kill();
				await pause((LEASE_SECONDS + 2) * 1000);
				await server.restart();
				await rows.insertMany(documents.slice(200));
				for (const { ended } of runs) expect((await ended).code, (await ended).stderr).toBe(0);
				const left = await rows.find().toArray();
				expect(left.map((row) => row.trained_count)).toEqual(Array.from({ length: 210 }, () => 1));
				expect(left.some((row) => "arl_claim" in row || "arl_acks" in row)).toBe(false);
				await client.close();
			} finally {
				delete process.env.ARL_TEST_FOLLOW_LEASE;
				await server.stop();
			}
		}, 90_000);
	},
);
