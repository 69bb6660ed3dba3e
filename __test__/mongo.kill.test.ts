/** kill -9 of a run on a database, at any moment: what counts as trained is what the checkpoints hold, no more and no less. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { MongoClient } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { xoshiro128 } from "../src/data/sampler/order.js";
import { temporaryFolder } from "./support/folder.js";
import { lastCheckpoint } from "./support/follow.js";
import { KILLS } from "./support/kills.js";
import { type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";
import { arl, differingFiles, flags, type Place, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const AT_ONCE = 2;
const ROWS = 24;
const STEP_ROWS = 4;
const EPOCHS = 1.5;
const STEPS = 9;

function command(place: Place, uri: string, out: string, resume: boolean): string[] {
	const options = {
		model_name_or_path: place.model,
		db_connection_string: uri,
		output_dir: out,
		init_from_config: true,
		per_device_train_batch_size: 2,
		gradient_accumulation_steps: STEP_ROWS / 2,
		num_train_epochs: EPOCHS,
		// So that which row is trained in which step can be seen without the program's own plan.
		train_sampling_strategy: "sequential",
		learning_rate: 1e-2,
		save_steps: 2,
		save_total_limit: 2,
		threads: 1,
		...(resume && { resume_from_checkpoint: "latest" }),
	};
	return ["train", ...flags(options)];
}

/** How often each row is trained in the first `steps` steps, and in which of them last (-1: in none). */
function expected(steps: number): { count: number; last: number }[] {
	const rows = Array.from({ length: ROWS }, () => ({ count: 0, last: -1 }));
	for (let step = 1; step <= steps; step++) {
		for (let i = 0; i < STEP_ROWS; i++) {
			const row = rows[((step - 1) * STEP_ROWS + i) % ROWS];
			if (row) {
				row.count += 1;
				row.last = step;
			}
		}
	}
	return rows;
}

describe.skipIf(mongoMissing("kill -9 of a run on a database"))("kill -9 of a run on a database", () => {
	let server: MongoServer;
	let client: MongoClient;
	beforeAll(async () => {
		server = await startMongo();
		client = await new MongoClient(server.uri).connect();
	});
	afterAll(async () => {
		await client?.close();
		await server?.stop();
	});

	it.each(["ack", "agentrl"] as const)(
		`at random moments, between the writes of %s included: after going on every row has the count of its steps`,
		async (mode) => {
			const place = tinyPlace(folder, ROWS);
			const lines = readFileSync(place.file, "utf8").trimEnd().split("\n");
			const fill = async (): Promise<{ uri: string; name: string }> => {
				const name = newDatabase();
				const rows = lines.map((line) => ({
					_class_id: "DBRecordData",
					...JSON.parse(line),
					split: "train",
					fetched: false,
				}));
				await client.db(name).collection("DBRecordData").insertMany(rows);
				return { uri: server.uriOf(name), name };
			};
			const more = ["--mongo_write_back", mode];
			const counts = async (name: string) => {
				const documents = await client.db(name).collection("DBRecordData").find().sort({ _id: 1 }).toArray();
				return documents.map((document) => ({
					count: document.trained_count ?? 0,
					last: document.last_trained_step ?? -1,
					marked: "arl_acks" in document,
				}));
			};
			const whole = `${place.out}-whole`;
			const first = await fill();
			const started = performance.now();
			const never = await arl([...command(place, first.uri, whole, false), ...more]);
			let wallMs = performance.now() - started;
			expect(never.code, never.stderr).toBe(0);
			const done = expected(STEPS).map((row) => ({ ...row, marked: false }));
			expect(await counts(first.name)).toEqual(done);

			const kills = mode === "ack" ? KILLS : Math.min(KILLS, 12);
			const next = xoshiro128([20, 26, 11, 23]);
			const moments = { killed: 0, done: 0, beforeFirstSave: 0, midAcknowledgement: 0, countsBehind: 0 };
			const one = async (i: number) => {
				const { uri, name } = await fill();
				const out = `${place.out}-${mode}-${i}`;
				// A third of the kills wait for an acknowledgement that has begun; time alone seldom meets one.
				const ledger = client.db(name).collection("arl_acks");
				const wanted = mode === "ack" && i % 3 === 0 ? 1 + Math.floor((next() / 2 ** 32) * 4) : 0;
				const delay = wallMs * (0.6 + 1.1 * ((i + next() / 2 ** 32) / kills));
				let over = false;
				const begun = performance.now();
				const killed = await arl([...command(place, uri, out, false), ...more], (kill) => {
					if (wanted === 0) {
						setTimeout(() => kill("SIGKILL"), delay);
						return;
					}
					const watch = async () => {
						let seen = 0;
						while (!over) {
							const entry = await ledger.findOne({ state: "pending", step: { $gt: seen } });
							if (entry === null) continue;
							seen = entry.step + 1;
							if (seen >= wanted * 2) break;
						}
						kill("SIGKILL");
					};
					watch().catch(() => {});
				});
				over = true;
				if (killed.signal === "SIGKILL") moments.killed += 1;
				else {
					moments.done += 1;
					// The machine has less to do than when the first run was timed, alone: the next kills come sooner.
					wallMs = Math.min(wallMs, (performance.now() - begun) / 1.7);
				}
				const saved = lastCheckpoint(out);
				if (saved === 0) moments.beforeFirstSave += 1;
				const pending = await ledger.countDocuments({ state: "pending" });
				const after = await counts(name);
				if (pending > 0 || after.some(({ marked }) => marked)) moments.midAcknowledgement += 1;
				// Never more than the checkpoint holds; less only while the acknowledgement is on its way.
				const bound = expected(saved);
				if (after.some(({ count }, row) => count < (bound[row]?.count ?? 0))) moments.countsBehind += 1;
				for (const [row, { count }] of after.entries()) {
					expect(count, `kill ${i}, row ${row}, ${saved} steps saved`).toBeLessThanOrEqual(bound[row]?.count ?? 0);
				}
				const resumed = await arl([...command(place, uri, out, true), ...more]);
				expect(resumed.code, `kill ${i}\n${killed.stderr}\n${resumed.stderr}`).toBe(0);
				expect(await counts(name), `kill ${i}`).toEqual(done);
				expect(await ledger.countDocuments({ state: { $ne: "done" } })).toBe(0);
				expect(differingFiles(join(whole, `checkpoint-${STEPS}`), join(out, `checkpoint-${STEPS}`))).toEqual([]);
			};
			const queue = Array.from({ length: kills }, (_, i) => i);
			const worker = async () => {
				for (let i = queue.shift(); i !== undefined; i = queue.shift()) await one(i);
			};
			await Promise.all(Array.from({ length: AT_ONCE }, worker));
			process.stderr.write(`kill -9 on a database (${mode}): ${JSON.stringify(moments)}\n`);
			expect(moments.killed).toBeGreaterThan(kills / 2);
			if (mode === "ack") expect(moments.midAcknowledgement).toBeGreaterThan(0);
		},
		600_000,
	);
});
