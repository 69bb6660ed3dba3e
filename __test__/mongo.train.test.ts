/** Training on rows of a database: the same bits as from a file, counted when a checkpoint is complete. */
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { DBRef, type Document, Double, MongoClient, ObjectId } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { killMissing, type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";
import { arl, contents, differingFiles, flags, metricsOf, type Place, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

/** Rows of a file as documents of `DBRecordData`, in the file's order. */
function recordData(file: string): Document[] {
	const lines = readFileSync(file, "utf8").trimEnd().split("\n");
	return lines.map((line) => ({ _class_id: "DBRecordData", ...JSON.parse(line), split: "train", fetched: false }));
}

/** The same rows as records, with one sample for each reply. */
function records(file: string): Record<"Record" | "DispatchedSamplingTask" | "Task", Document[]> {
	const task = { _id: new ObjectId(), _class_id: "Task", scores: [new Double(0)] };
	const samples: Document[] = [];
	const lines = readFileSync(file, "utf8").trimEnd().split("\n");
	const documents = lines.map((line) => {
		const { messages, ...rest } = JSON.parse(line);
		const replies = messages.flatMap((message: Document, i: number) => (message.role === "assistant" ? [i] : []));
		const own = replies.map((i: number, at: number) => ({
			_id: new ObjectId(),
			_class_id: "DispatchedSamplingTask",
			status: "completed",
			req_type: "chatcompletions",
			// Found in the wild: an array around the request.
			request: at === 0 ? [{ messages: messages.slice(0, i), ...rest }] : { messages: messages.slice(0, i), ...rest },
			response: { choices: [{ message: messages[i], logprobs: null }] },
			advantage: null,
			score: null,
		}));
		samples.push(...own);
		return {
			_id: new ObjectId(),
			_class_id: "Record",
			task: new DBRef("Task", task._id),
			traj: own.map(({ _id }: { _id: ObjectId }) => new DBRef("DispatchedSamplingTask", _id)),
			status: "ready",
			split: "train",
			score: new Double(1),
			trained_count: 0,
			last_trained_step: -1,
		};
	});
	return { Record: documents, DispatchedSamplingTask: samples, Task: [task] };
}

const options = (place: Place, more: Record<string, string | number | boolean> = {}) =>
	flags({
		model_name_or_path: place.model,
		output_dir: place.out,
		init_from_config: true,
		per_device_train_batch_size: 2,
		gradient_accumulation_steps: 2,
		num_train_epochs: 2.5,
		learning_rate: 1e-2,
		logging_steps: 1,
		save_steps: 4,
		threads: 1,
		...more,
	});

/** The numbers that a run logged, without times. */
const logged = (out: string) =>
	metricsOf(out).map(({ step, epoch, loss, grad_norm, learning_rate, mean_token_accuracy, num_tokens }) => {
		return { step, epoch, loss, grad_norm, learning_rate, mean_token_accuracy, num_tokens };
	});

describe.skipIf(mongoMissing("training on a database"))("training on a database", () => {
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

	it("gives the losses and the weights that the same rows give from a file, in bits, and counts each epoch", async () => {
		const place = tinyPlace(folder, 36);
		const fromFile = { ...place, out: `${place.out}-file` };
		const file = await arl(["train", "--train_file", place.file, ...options(fromFile)]);
		expect(file.code, file.stderr).toBe(0);
		const database = newDatabase();
		await client.db(database).collection("DBRecordData").insertMany(recordData(place.file));
		const run = await arl(["train", "--db_connection_string", server.uriOf(database), ...options(place)]);
		expect(run.code, run.stderr).toBe(0);
		expect(logged(place.out)).toEqual(logged(fromFile.out));
		expect(differingFiles(`${place.out}/checkpoint-23`, `${fromFile.out}/checkpoint-23`)).toEqual([]);
		const counts = await client.db(database).collection("DBRecordData").find().toArray();
		expect(counts.reduce((sum, { trained_count }) => sum + trained_count, 0)).toBe(36 + 36 + 18 + 2);
		expect(counts.every((document) => !("arl_acks" in document))).toBe(true);
	});

	it("leaves no checkpoint without the list of its documents: where that cannot be written, the run ends before the first one", async () => {
		const place = tinyPlace(folder, 36);
		const database = await fill({ DBRecordData: recordData(place.file) });
		mkdirSync(place.out, { recursive: true });
		writeFileSync(join(place.out, ".arl-rows"), "a file, where the lists' folder would be");
		const run = await arl(["train", "--db_connection_string", server.uriOf(database), ...options(place)]);
		expect(run.code).toBe(1);
		expect(run.stderr).toContain(".arl-rows");
		expect(readdirSync(place.out).filter((name) => name.startsWith("checkpoint"))).toEqual([]);
	});

	/** A new database with these documents. */
	async function fill(collections: Record<string, Document[]>): Promise<string> {
		const name = newDatabase();
		for (const [collection, documents] of Object.entries(collections)) {
			await client.db(name).collection(collection).insertMany(documents);
		}
		return name;
	}

	const countsOf = async (name: string, collection: string): Promise<number[]> => {
		const documents = await client.db(name).collection(collection).find().sort({ _id: 1 }).toArray();
		return documents.map(({ trained_count: count }) => count ?? 0);
	};

	it("gives the same bits from records, whose samples become the replies of one row", async () => {
		const place = tinyPlace(folder, 24);
		const fromFile = { ...place, out: `${place.out}-file` };
		const more = { num_train_epochs: 1, mongo_write_back: "agentrl" };
		const file = await arl(["train", "--train_file", place.file, ...options(fromFile, { num_train_epochs: 1 })]);
		expect(file.code, file.stderr).toBe(0);
		const name = await fill(records(place.file));
		const run = await arl(["train", "--db_connection_string", server.uriOf(name), ...options(place, more)]);
		expect(run.code, run.stderr).toBe(0);
		expect(logged(place.out)).toEqual(logged(fromFile.out));
		expect(differingFiles(`${place.out}/checkpoint-6`, `${fromFile.out}/checkpoint-6`)).toEqual([]);
		expect(await countsOf(name, "Record")).toEqual(Array.from({ length: 24 }, () => 1));
		expect(await client.db(name).collection("arl_acks").countDocuments()).toBe(0);
		const again = await arl([
			"train",
			"--db_connection_string",
			server.uriOf(name),
			...options({ ...place, out: `${place.out}-again` }),
		]);
		expect(again.code).toBe(3);
		expect(again.stderr).toContain("24 with status ready");
		expect(again.stderr).toContain("0 with trained_count < 1");
	});

	it("mixes with files, and takes the connection string from the environment; packed and unshuffled too", async () => {
		const place = tinyPlace(folder, 20);
		const lines = readFileSync(place.file, "utf8").trimEnd().split("\n");
		const [a, b] = [join(folder, "a.jsonl"), join(folder, "b.jsonl")];
		writeFileSync(a, `${lines.slice(0, 8).join("\n")}\n`);
		writeFileSync(b, `${lines.slice(8).join("\n")}\n`);
		const name = await fill({ DBRecordData: recordData(b) });
		const { per_device_train_batch_size: _, ...kept } = { per_device_train_batch_size: 2, num_train_epochs: 2 };
		const words = options(place, kept).filter((word, i, all) => {
			return word !== "--per_device_train_batch_size" && all[i - 1] !== "--per_device_train_batch_size";
		});
		const packed = [...words, "--max_tokens_per_micro_batch", "700", "--train_weights", "1", "3"];
		const files = await arl(["train", "--train_file", a, b, ...packed, "--output_dir", `${place.out}-file`]);
		expect(files.code, files.stderr).toBe(0);
		process.env.ARL_DB_CONNECTION_STRING = server.uriOf(name);
		try {
			const ignored = await arl(["train", "--train_file", a, ...words, "--print_config"]);
			expect(ignored.stdout).toMatch(/db_connection_string +none +default/);
			const run = await arl(["train", "--train_file", a, "--db_source", "auto", ...packed]);
			expect(run.code, run.stderr).toBe(0);
		} finally {
			delete process.env.ARL_DB_CONNECTION_STRING;
		}
		expect(logged(place.out)).toEqual(logged(`${place.out}-file`));
	});

	it("goes on with the documents that it began with, whatever became of them and of others", async () => {
		const place = tinyPlace(folder, 24);
		const documents = recordData(place.file).map((document) => ({ _id: new ObjectId(), ...document }));
		const name = await fill({ DBRecordData: documents });
		const uri = ["--db_connection_string", server.uriOf(name)];
		const whole = { ...place, out: `${place.out}-whole` };
		expect((await arl(["train", "--train_file", place.file, ...options(whole)])).code).toBe(0);
		const first = await arl(["train", ...uri, ...options(place, { max_steps: 8, lr_scheduler_type: "constant" })]);
		expect(first.code, first.stderr).toBe(0);
		const collection = client.db(name).collection("DBRecordData");
		await collection.insertMany(recordData(place.file).map((document) => ({ ...document, split: "train" })));
		await collection.updateMany(
			{ _id: { $in: documents.slice(0, 5).map(({ _id }) => _id) } },
			{ $set: { fetched: true } },
		);
		const more = { max_steps: 15, lr_scheduler_type: "constant" };
		const resumed = await arl(["train", ...uri, ...options(place, more), "--resume_from_checkpoint", "latest"]);
		expect(resumed.code, resumed.stderr).toBe(0);
		const straight = { ...place, out: `${place.out}-straight` };
		expect((await arl(["train", "--train_file", place.file, ...options(straight, more)])).code).toBe(0);
		expect(logged(place.out)).toEqual(logged(straight.out));
		expect((await countsOf(name, "DBRecordData")).slice(24)).toEqual(Array.from({ length: 24 }, () => 0));
		expect((await countsOf(name, "DBRecordData")).reduce((sum, count) => sum + count)).toBe(15 * 4);
		// From a checkpoint into another folder too: the list is found next to the checkpoint, and kept in the new folder.
		const moved = { ...place, out: `${place.out}-moved` };
		const further = ["--resume_from_checkpoint", `${place.out}/checkpoint-15`];
		const longer = await arl(["train", ...uri, ...options(moved, { ...more, max_steps: 17 }), ...further]);
		expect(longer.code, longer.stderr).toBe(0);
		expect((await countsOf(name, "DBRecordData")).reduce((sum, count) => sum + count)).toBe(17 * 4);
		expect(readdirSync(join(moved.out, ".arl-rows"))).toEqual(readdirSync(join(place.out, ".arl-rows")));
		const split = await arl(["train", ...uri, ...options(place, { ...more, split: "valid" }), ...further]);
		expect(split.stderr).toContain("split: train -> valid");
		const elsewhere = await arl([
			"train",
			...["--db_connection_string", server.uriOf(newDatabase())],
			...options(place, { ...more, max_steps: 16 }),
			...["--resume_from_checkpoint", "latest"],
		]);
		expect(elsewhere.code).toBe(3);
		expect(elsewhere.stderr).toContain("database:");
	});

	it("lets two runs at once train the same rows; each counts", async () => {
		const place = tinyPlace(folder, 24);
		const name = await fill({ DBRecordData: recordData(place.file) });
		const run = (out: string) =>
			arl([
				"train",
				...["--db_connection_string", server.uriOf(name), "--max_trained_count", "9"],
				...options({ ...place, out }, { num_train_epochs: 2, save_steps: 1 }),
			]);
		const ended = await Promise.all([run(`${place.out}-1`), run(`${place.out}-2`)]);
		for (const { code, stderr } of ended) expect(code, stderr).toBe(0);
		expect(logged(`${place.out}-1`)).toEqual(logged(`${place.out}-2`));
		expect(await countsOf(name, "DBRecordData")).toEqual(Array.from({ length: 24 }, () => 4));
		const ledger = await client.db(name).collection("arl_acks").distinct("run");
		expect(ledger).toHaveLength(2);
	});

	it("stops at a document that cannot be a row, or leaves it out and says which", async () => {
		const place = tinyPlace(folder, 12);
		const documents = recordData(place.file).map((document) => ({ _id: new ObjectId(), ...document }));
		const [first, second, third] = documents;
		Object.assign(first ?? {}, { advantages: { "0": new Double(1) } });
		Object.assign(second ?? {}, { reward: Number.NaN });
		Object.assign(third ?? {}, { messages: "none" });
		const name = await fill({ DBRecordData: documents });
		const uri = ["--db_connection_string", server.uriOf(name), "--num_train_epochs", "1"];
		const words = options(place).filter((word, i, all) => !/num_train_epochs/.test(`${word}${all[i - 1]}`));
		const strict = await arl(["train", ...uri, ...words]);
		expect(strict.code).toBe(3);
		for (const document of [first, second, third]) {
			expect(strict.stderr).toContain(`DBRecordData ${document?._id.toHexString()}: `);
		}
		expect(strict.stderr).toContain("NaN has no JSON text");
		expect(existsSync(place.out)).toBe(false);
		const lenient = await arl(["train", ...uri, ...words, "--on_bad_row", "skip"]);
		expect(lenient.code, lenient.stderr).toBe(0);
		const none = await fill({
			DBRecordData: documents.slice(0, 8).map((document) => ({ ...document, reward: Number.NaN })),
		});
		const skipping = ["--on_bad_row", "skip", "--output_dir", `${place.out}-none`];
		const nothing = await arl(["train", ...uri.with(1, server.uriOf(none)), ...words, ...skipping]);
		expect(nothing.code).toBe(3);
		expect(nothing.stderr).toContain("8 of 8 rows cannot be used (8 not finite)");
		const counts = await countsOf(name, "DBRecordData");
		expect(counts).toEqual([0, 0, 0, ...Array.from({ length: 9 }, () => 1)]);
	});

	it("refuses epochs that bring a row again sooner than retrained_interval allows", async () => {
		const place = tinyPlace(folder, 12);
		const name = await fill({ DBRecordData: recordData(place.file) });
		const uri = ["--db_connection_string", server.uriOf(name), "--retrained_interval", "3"];
		const shuffled = await arl(["train", ...uri, ...options(place)]);
		expect(shuffled.code).toBe(2);
		expect(shuffled.stderr).toMatch(
			/retrained_interval 3: DBRecordData [0-9a-f]{24} would be trained in step \d and again/,
		);
		const inOrder = await arl(["train", ...uri, ...options(place), "--train_sampling_strategy", "sequential"]);
		expect(inOrder.code, inOrder.stderr).toBe(0);
	});

	it("writes nothing with mongo_write_back none", async () => {
		const place = tinyPlace(folder, 8);
		const name = await fill({ DBRecordData: recordData(place.file) });
		const before = await client.db(name).collection("DBRecordData").find().toArray();
		const uri = ["--db_connection_string", server.uriOf(name), "--mongo_write_back", "none"];
		const run = await arl(["train", ...uri, ...options(place, { save_strategy: "no" })]);
		expect(run.code, run.stderr).toBe(0);
		expect(await client.db(name).collection("DBRecordData").find().toArray()).toEqual(before);
		expect(await client.db(name).listCollections().toArray()).toHaveLength(1);
	});
});

describe.skipIf(killMissing("a server that goes while a run trains"))("a server that goes while a run trains", () => {
	it("is waited for: nothing is lost, nothing counts twice", async () => {
		const server = await startMongo();
		try {
			const place = tinyPlace(folder, 40);
			const fromFile = { ...place, out: `${place.out}-file` };
			const more = { num_train_epochs: 3, save_steps: 1, save_total_limit: 1 };
			expect((await arl(["train", "--train_file", place.file, ...options(fromFile, more)])).code).toBe(0);
			const client = await new MongoClient(server.uri).connect();
			const documents = client.db().collection("DBRecordData");
			await documents.insertMany(recordData(place.file));
			let over = false;
			let kills = 0;
			const disturb = async () => {
				while (!over && kills < 3) {
					// Once a few more rows are counted the server goes, in the middle of whatever it does.
					const counted = await documents.countDocuments({ trained_count: { $gt: kills } }).catch(() => 0);
					if (counted < 8) continue;
					await server.kill();
					kills += 1;
					await new Promise((resolve) => setTimeout(resolve, 1500));
					await server.restart();
				}
			};
			const disturbing = disturb();
			const run = await arl(["train", "--json", "--db_connection_string", server.uri, ...options(place, more)]);
			over = true;
			await disturbing;
			expect(run.code, run.stderr).toBe(0);
			expect(kills).toBeGreaterThan(0);
			const notices = run.stdout
				.trimEnd()
				.split("\n")
				.map((line) => JSON.parse(line))
				.filter(({ type }) => type === "notice");
			expect(notices.some(({ message }) => /retrying for up to 300 s/.test(message))).toBe(true);
			expect(notices.some(({ message }) => /responds again after \d+ s; the run continues/.test(message))).toBe(true);
			expect(logged(place.out)).toEqual(logged(fromFile.out));
			const left = await documents.find().toArray();
			expect(left.map(({ trained_count: count }) => count)).toEqual(Array.from({ length: 40 }, () => 3));
			expect(left.some((document) => "arl_acks" in document)).toBe(false);
			await client.close();
		} finally {
			await server.stop();
		}
	}, 120_000);

	it("never shows the password: not in output, files, errors or the configuration", async () => {
		const server = await startMongo(["--standalone", "--auth"]);
		try {
			const host = new URL(server.uri.replace("mongodb", "http")).host;
			const admin = await new MongoClient(`mongodb://${host}/admin`).connect();
			await admin.db("admin").command({ createUser: "joe", pwd: "hunter2/@", roles: ["root"] });
			await admin.close();
			const uri = `mongodb://joe:hunter2%2F%40@${host}/secret?authSource=admin`;
			const place = tinyPlace(folder, 8);
			const client = await new MongoClient(uri).connect();
			await client.db().collection("DBRecordData").insertMany(recordData(place.file));
			const secret = ["train", "--db_connection_string", uri];
			const runs = [
				await arl([...secret, ...options(place)]),
				await arl([
					...secret,
					...options({ ...place, out: `${place.out}-json` }),
					"--json",
					"--max_trained_count",
					"9",
				]),
				await arl([...secret, ...options(place), "--print_config"]),
				await arl([...secret, ...options(place), "--print_config", "--json"]),
				await arl([...secret.slice(0, 2), uri.replace("hunter2", "hunter22"), ...options(place)]),
				await arl([...secret.slice(0, 2), uri.replace(host, "127.0.0.1:1"), ...options(place), "--db_match", "{"]),
			];
			expect(runs.map(({ code }) => code).slice(0, 4), runs[0]?.stderr).toEqual([0, 0, 0, 0]);
			for (const { stdout, stderr } of runs) expect(`${stdout}${stderr}`).not.toMatch(/hunter2|joe:/);
			for (const out of [place.out, `${place.out}-json`]) {
				for (const [path, bytes] of contents(out)) expect(bytes.includes("hunter2"), path).toBe(false);
			}
			// An account that may only read is reported before anything is trained.
			const reader = { createUser: "reader", pwd: "hunter2", roles: [{ role: "read", db: "secret" }] };
			await client.db("admin").command(reader);
			const reading = ["train", "--db_connection_string", `mongodb://reader:hunter2@${host}/secret?authSource=admin`];
			const more = { max_trained_count: 99, output_dir: `${place.out}-reader` };
			const refused = await arl([...reading, ...options(place, more)]);
			expect(refused.code).toBe(2);
			expect(refused.stderr).toContain("no right");
			expect(refused.stderr).toContain("--mongo_write_back none");
			expect(existsSync(more.output_dir)).toBe(false);
			const only = await arl([...reading, ...options(place, { ...more, mongo_write_back: "none" })]);
			expect(only.code, only.stderr).toBe(0);
			await client.close();
		} finally {
			await server.stop();
		}
	});
});
