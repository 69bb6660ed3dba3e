/** The password of a database is in no output and no file, whatever goes well or wrong. */
import { mkdtempSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { MongoClient } from "mongodb";
import { describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { killMissing, startMongo } from "./support/mongo.js";
import { arl, contents, flags, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const PASSWORD = "s3cr3t@p/w";
const ENCODED = "s3cr3t%40p%2Fw";

describe.skipIf(killMissing("a server with accounts of its own"))("a password", () => {
	it("is in no output and no file of any command", async () => {
		const server = await startMongo(["--standalone", "--auth"]);
		try {
			const open = new MongoClient(server.uri);
			// The first account may be made without one.
			await open.db("admin").command({ createUser: "joe", pwd: PASSWORD, roles: [{ role: "root", db: "admin" }] });
			await open.close();
			const place = tinyPlace(mkdtempSync(join(folder, "secret-")), 12);
			const { host } = new URL(server.uri);
			const good = `mongodb://joe:${ENCODED}@${host}/rows?authSource=admin&appName=x`;
			const soon = "&serverSelectionTimeoutMS=400&connectTimeoutMS=400";
			const config = join(folder, "run.yaml");
			writeFileSync(join(folder, "bad.jsonl"), '{"messages":[]}\n');
			const said: { words: string; code: number | null; text: string }[] = [];
			const run = async (wanted: number, words: string[], uri: string) => {
				const { code, stdout, stderr } = await arl([...words, "--db_connection_string", uri]);
				said.push({ words: words.join(" "), code, text: stdout + stderr });
				expect({ words, code }, stdout + stderr).toMatchObject({ code: wanted });
			};
			let runs = 0;
			const train = (...more: string[]) => {
				const output_dir = join(place.out, String(runs++));
				const options = { model_name_or_path: place.model, output_dir, max_steps: 2, init_from_config: true };
				return ["train", ...flags(options), ...more];
			};
			await run(0, ["mongo", "import", place.file], good);
			await run(3, ["mongo", "import", join(folder, "bad.jsonl")], good);
			await run(0, ["mongo", "status", "--json"], good);
			await run(0, ["mongo", "export", "--out", join(place.out, "..", "out.jsonl")], good);
			await run(3, ["mongo", "export", "--out", join(place.out, "..", "none.jsonl"), "--split", "eval"], good);
			await run(0, train("--print_config"), good);
			await run(0, train("--print_config", "--json"), good);
			await run(0, train("--json"), good);
			await run(3, train("--split", "eval"), good);
			await run(2, train("--db_sorce", "auto"), good);
			for (const [uri, code] of [
				[good.replace("joe:s3", "joe:wrong-s3"), 2],
				[good.replace("/rows", ""), 2],
				[good.replace("joe:", "joe:?"), 2],
				[good.replace("authSource", "nonsense"), 2],
				[`mongodb://joe:${ENCODED}@127.0.0.1:1/rows?authSource=admin${soon}`, 1],
				[`${good}${soon}&tls=true&tlsCertificateKeyFilePassword=s3cr3t-key`, 1],
				[good.replace("mongodb:", "mongo:"), 2],
			] as const) {
				await run(code, ["mongo", "status"], uri);
				if (code === 2) await run(code, train(), uri);
			}
			writeFileSync(config, `db_connection_string: "${good}"\nmodel_name_or_path: ${place.model}\nmax_stepz: 1\n`);
			const fromFile = await arl(["train", config]);
			expect(fromFile.code).toBe(2);
			said.push({ words: "config", code: 2, text: fromFile.stdout + fromFile.stderr });
			expect(said.filter(({ text }) => text.includes("s3cr3t"))).toEqual([]);
			const files = [...contents(join(place.out, ".."))];
			expect(files.map(([name]) => name)).toContain(join("out", "2", "metrics.jsonl"));
			const holds = (bytes: Buffer) => [PASSWORD, ENCODED, "s3cr3t"].some((form) => bytes.includes(form));
			expect(files.filter(([, bytes]) => holds(bytes)).map(([name]) => name)).toEqual([]);
		} finally {
			await server.stop();
		}
	}, 180_000);
});
