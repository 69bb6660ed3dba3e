/** Training on rows of a database: the same bits as from a file, counted when a checkpoint stands. */
import { readFileSync } from "node:fs";
import { type Document, MongoClient } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";
import { arl, differingFiles, flags, metricsOf, type Place, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

/** Rows of a file as documents of `DBRecordData`, in the file's order. */
function recordData(file: string): Document[] {
	const lines = readFileSync(file, "utf8").trimEnd().split("\n");
	return lines.map((line) => ({ _class_id: "DBRecordData", ...JSON.parse(line), split: "train", fetched: false }));
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
});
