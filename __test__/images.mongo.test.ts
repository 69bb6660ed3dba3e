/** Documents of a database whose messages have pictures: AgentRL's, trained by a model that sees. */
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Document, MongoClient } from "mongodb";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { encodePng } from "../src/images/png.js";
import { temporaryFolder } from "./support/folder.js";
import { type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";
import { arl, differingFiles, flags, metricsOf, root } from "./support/real.js";

const folder = temporaryFolder();
const model = join(folder, "model");
const file = join(folder, "rows.jsonl");

/** A picture of one grey, as a `data:` URL. */
function picture(grey: number): string {
	const png = encodePng(new Uint8Array(3 * 48 * 64).fill(grey), 48, 64);
	return `data:image/png;base64,${png.toString("base64")}`;
}

const logged = (out: string) =>
	metricsOf(join(folder, out)).map(({ loss, grad_norm, num_tokens }) => ({ loss, grad_norm, num_tokens }));

describe.skipIf(mongoMissing("training on pictures of a database"))("pictures of a database's documents", () => {
	let server: MongoServer;
	let client: MongoClient;
	beforeAll(async () => {
		execFileSync(process.execPath, [join(root, "examples", "make-model.mjs"), model, "--sees"]);
		const rows = Array.from({ length: 6 }, (_, i) => {
			const image = { type: "image_url", image_url: { url: picture(40 * i) } };
			const question = { role: "user", content: [image, { type: "text", text: "How bright?" }] };
			return { messages: [question, { role: "assistant", content: i < 3 ? "dark" : "light" }] };
		});
		writeFileSync(file, rows.map((row) => `${JSON.stringify(row)}\n`).join(""));
		server = await startMongo();
		client = await new MongoClient(server.uri).connect();
	}, 60_000);
	afterAll(async () => {
		await client?.close();
		await server?.stop();
	});

	async function train(out: string, more: Record<string, string | number | boolean>): Promise<string> {
		const options = {
			model_name_or_path: model,
			init_from_config: true,
			output_dir: join(folder, out),
			per_device_train_batch_size: 2,
			num_train_epochs: 2,
			logging_steps: 1,
			save_steps: 6,
			learning_rate: 1e-3,
			threads: 1,
		};
		const ended = await arl(["train", ...flags({ ...options, ...more })]);
		expect(ended.code, ended.stderr).toBe(0);
		return ended.stderr;
	}

	it("give the losses and the weights that the same rows give from a file, in bits, in every epoch", async () => {
		await train("file", { train_file: file });
		const database = newDatabase();
		const documents: Document[] = readFileSync(file, "utf8")
			.trimEnd()
			.split("\n")
			.map((line) => ({ _class_id: "DBRecordData", ...JSON.parse(line), split: "train", fetched: false }));
		await client.db(database).collection("DBRecordData").insertMany(documents);
		const said = await train("database", { db_connection_string: server.uriOf(database) });
		expect(said).toContain("images are trained");
		expect(logged("database")).toHaveLength(6);
		expect(logged("database")).toEqual(logged("file"));
		const last = (out: string) => join(folder, out, "checkpoint-6");
		expect(differingFiles(last("database"), last("file"))).toEqual([]);
	}, 120_000);
});
