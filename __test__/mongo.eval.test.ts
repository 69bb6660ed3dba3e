/** Held-out rows of a database: the documents of another split, evaluated as from a file, and never changed. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Document, MongoClient } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";
import { arl, flags, metricsOf, root, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

/** Lines as documents of one split. */
function documents(lines: readonly string[], split: string): Document[] {
	return lines.map((line) => ({ _class_id: "DBRecordData", ...JSON.parse(line), split, fetched: false }));
}

describe.skipIf(mongoMissing("held-out rows of a database"))("held-out rows of a database", () => {
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

	it("are the documents of eval_split, with the figures of the same rows in a file, trained before or not, and not changed", async () => {
		const place = tinyPlace(folder, 24);
		const trained = readFileSync(place.file, "utf8").trimEnd().split("\n");
		const heldOut = readFileSync(join(root, "assets", "heldout.jsonl"), "utf8")
			.split("\n")
			.slice(0, 10);
		const file = join(folder, "heldout.jsonl");
		writeFileSync(file, `${heldOut.join("\n")}\n`);
		const name = newDatabase();
		const collection = client.db(name).collection("DBRecordData");
		// Counted as trained by another run: what is evaluated does not depend on it.
		const before = documents(heldOut, "validation").map((row, i) => ({
			...row,
			trained_count: i % 3,
			last_trained_step: i,
		}));
		await collection.insertMany([...documents(trained, "train"), ...before]);
		const options = {
			model_name_or_path: place.model,
			init_from_config: true,
			max_steps: 4,
			learning_rate: 1e-2,
			logging_steps: 2,
			save_steps: 2,
			eval_strategy: "steps",
		};
		const uri = server.uriOf(name);
		const words = { ...options, output_dir: place.out, db_connection_string: uri, eval_split: "validation" };
		const fromDatabase = await arl(["train", ...flags(words)]);
		expect(fromDatabase.code, fromDatabase.stderr).toBe(0);
		const out = `${place.out}-file`;
		const fromFile = await arl([
			"train",
			...flags({ ...options, output_dir: out, train_file: place.file, eval_file: file }),
		]);
		expect(fromFile.code, fromFile.stderr).toBe(0);
		const figures = (of: string) =>
			metricsOf(of)
				.filter((line) => "eval_loss" in line)
				.map(({ eval_runtime: _, eval_samples_per_second: __, ...rest }) => {
					// A document and a line have places of their own.
					const highest = rest.highest_losses as unknown as { location: string; loss: number; targets: number }[];
					return { ...rest, step: rest.step, highest_losses: highest.map(({ location: _, ...row }) => row) };
				});
		expect(figures(place.out).map(({ step }) => step)).toEqual([2, 4]);
		expect(figures(place.out)).toEqual(figures(out));
		const after = await collection.find({ split: "validation" }).sort({ last_trained_step: 1 }).toArray();
		expect(after.map(({ trained_count, last_trained_step }) => [trained_count, last_trained_step])).toEqual(
			before.map(({ trained_count, last_trained_step }) => [trained_count, last_trained_step]),
		);
		const counts = await collection.find({ split: "train" }).toArray();
		expect(counts.reduce((sum, { trained_count = 0 }) => sum + trained_count, 0)).toBe(4 * 8);
	}, 120_000);
});
