/** The examples, as a user has them: copied to an empty folder, with `arl` installed, and their commands run as their READMEs have them. */
import { spawn } from "node:child_process";
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, readlinkSync, rmSync, symlinkSync } from "node:fs";
import { basename, delimiter, dirname, join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { type MongoServer, mongoMissing, newDatabase, startMongo } from "./support/mongo.js";
import { mpiruns } from "./support/ranks.js";
import { metricsOf, root } from "./support/real.js";

const sources = join(root, "examples");
const names = readdirSync(sources, { withFileTypes: true }).flatMap((entry) => (entry.isDirectory() ? entry.name : []));
const copy = join(temporaryFolder(), "examples");
mkdirSync(copy);
cpSync(join(sources, "make-model.mjs"), join(copy, "make-model.mjs"));
install(copy);
/** What running an example in the clone leaves behind. */
const MADE = /^(model|out|adapter|merged|one|two|pictures|row\.html|rows\.parquet)$/;

/** `arl` and what comes with it, as npm would install it in a folder. */
function install(folder: string): void {
	const modules = join(folder, "node_modules");
	mkdirSync(join(modules, ".bin"), { recursive: true });
	symlinkSync(root, join(modules, "arl"));
	symlinkSync(join("..", "arl", "dist", "cli", "main.js"), join(modules, ".bin", "arl"));
	for (const name of ["jiti", "@duckdb"]) symlinkSync(join(root, "node_modules", name), join(modules, name));
	symlinkSync(join("..", "jiti", "lib", "jiti-cli.mjs"), join(modules, ".bin", "jiti"));
}

/** The commands of an example's README, in their order. */
function commandsOf(name: string): string {
	const text = readFileSync(join(sources, name, "README.md"), "utf8");
	return [...text.matchAll(/^```sh\n(.*?)^```/gms)].map(([, block]) => block).join("\n");
}

/** Runs commands in a folder; returns their exit code and what they print. */
async function runCommands(commands: string, cwd: string, env: NodeJS.ProcessEnv) {
	const child = spawn("bash", ["-euo", "pipefail", "-c", commands], {
		cwd,
		stdio: ["ignore", "pipe", "pipe"],
		env: { ...process.env, NO_COLOR: "1", ...env },
	});
	let text = "";
	for (const stream of [child.stdout, child.stderr]) {
		stream.setEncoding("utf8").on("data", (chunk) => {
			text += chunk;
		});
	}
	const code = await new Promise((resolve) => child.on("close", resolve));
	return { code, text };
}

/** Runs the commands of an example in a new copy of its folder; returns what they print. Fails where one of them does. */
async function runExample(name: string, env: NodeJS.ProcessEnv = {}, again = true): Promise<string> {
	rmSync(join(copy, name), { recursive: true, force: true });
	cpSync(join(sources, name), join(copy, name), { recursive: true, filter: (path) => !MADE.test(basename(path)) });
	const { code, text } = await runCommands(commandsOf(name), join(copy, name), env);
	// As in `arlOnRanks`: on a very busy machine Open MPI's processes may not reach each other in time.
	if (code !== 0 && again && /PMIX_ERR_UNREACH/.test(text)) return runExample(name, env, false);
	expect(code, text).toBe(0);
	return text;
}

/** A path in the folder of an example that was run. */
const made = (...path: string[]) => join(copy, ...path);

const allExact = (rows: number) => `100.0 % of rows (${rows} of ${rows})`;

describe("an example", () => {
	it("has a README of at most a page, and is in the list of examples", () => {
		const list = readFileSync(join(sources, "README.md"), "utf8");
		expect(names.length).toBe(9);
		for (const name of names) {
			expect(list).toContain(`(${name}/README.md)`);
			expect(readFileSync(join(sources, name, "README.md"), "utf8").split("\n").length, name).toBeLessThanOrEqual(50);
		}
	});

	it("chat-jsonl learns its rows by heart", async () => {
		const text = await runExample("chat-jsonl");
		expect(text).toContain("12 rows of messages, 12 can be trained");
		expect(text).toContain("«The capital of France is Paris.<|im_end|>»");
		expect(text).toContain(allExact(12));
		expect(existsSync(made("chat-jsonl", "out", "report.html"))).toBe(true);
	}, 60_000);

	it("completion-text trains the completions alone", async () => {
		const text = await runExample("completion-text");
		expect(text).toContain("function add(a, b) { <|im_end|>\n<|im_start|>assistant\n«return a + b; }<|im_end|>»");
		expect(text).toContain(allExact(10));
	}, 60_000);

	it("typescript trains, measures and asks from code", async () => {
		const text = await runExample("typescript");
		expect(text).toMatch(/^(stopped|completed) after \d+ steps$/m);
		expect(text).toMatch(/^\d+ tokens, stop$/m);
		const distances = metricsOf(made("typescript", "out")).flatMap(({ eval_distance: distance }) => distance ?? []);
		expect(Math.min(...distances)).toBeLessThan(2);
	}, 60_000);

	it("evaluation stops early and keeps the best model", async () => {
		const text = await runExample("evaluation");
		expect(text).toContain("out: early_stopped");
		const evaluations = metricsOf(made("evaluation", "out")).filter((line) => "eval_loss" in line);
		const best = evaluations.reduce((a, b) => ((b.eval_loss ?? 0) < (a.eval_loss ?? 0) ? b : a));
		expect(evaluations.indexOf(best)).toBe(evaluations.length - 4);
		expect(readlinkSync(made("evaluation", "out", "best"))).toBe(`checkpoint-${best.step}`);
		const losses = [...text.matchAll(/^(?:model|out) +(\d+\.\d+) +\d/gm)].map(([, loss]) => Number(loss));
		expect(losses.length).toBe(2);
		expect(losses[1]).toBeLessThan(1.2);
		expect(losses[1]).toBeCloseTo(best.eval_loss ?? 0, 3);
	}, 60_000);

	it("lora answers with the adapter, and without it once it is merged", async () => {
		const text = await runExample("lora");
		expect(text).toContain(`model  ${allExact(8)}`);
		expect(text).toContain(`merged  ${allExact(8)}`);
		expect(existsSync(made("lora", "adapter", "adapter_model.safetensors"))).toBe(true);
	}, 60_000);

	it("images learns to see from nothing, and answers questions about pictures that it has not seen", async () => {
		const text = await runExample("images");
		expect(text).toContain("images: 1600 in 1600 rows; 0 scaled down, 0 scaled up");
		expect(text).toContain("[image 4 x 4 = 16 tokens, 0.png]");
		const [, exact = "0"] = /(\d+\.\d) % of rows \(\d+ of 200\)/.exec(text) ?? [];
		expect(Number(exact), text).toBeGreaterThan(90);
		expect(readFileSync(made("images", "row.html"), "utf8")).toContain("data:image/png;base64,");
	}, 300_000);

	it("packing-parquet trains packed rows of a Parquet file", async () => {
		const text = await runExample("packing-parquet");
		expect(text).toContain("64 rows of messages, 64 can be trained");
		expect(text).toContain("micro-batches of up to 512 tokens");
		const losses = metricsOf(made("packing-parquet", "out")).map(({ loss = 0 }) => loss);
		expect(losses.at(-1)).toBeLessThan((losses[0] ?? 0) * 0.8);
	}, 60_000);

	const [mpirun] = mpiruns();
	it.skipIf(mpirun === undefined)(
		"two-ranks has the bits of one",
		async () => {
			const folder = dirname(mpirun?.file ?? "");
			const text = await runExample("two-ranks", { PATH: `${folder}${delimiter}${process.env.PATH}` });
			expect(text).toContain("2 ranks");
			expect(existsSync(made("two-ranks", "two", "model.safetensors"))).toBe(true);
		},
		120_000,
	);
});

describe.skipIf(mongoMissing("the example of rows from MongoDB"))("an example on a MongoDB server", () => {
	let server: MongoServer | undefined;
	afterAll(() => server?.stop());

	it("tools-mongodb trains an agent's calls and answers, and counts the rows as trained", async () => {
		server = await startMongo();
		const text = await runExample("tools-mongodb", { ARL_DB_CONNECTION_STRING: server.uri });
		expect(text).toContain(allExact(8));
		expect(text).toContain("(16 of 16)");
	}, 60_000);

	it("the project that arl init writes on a database imports its rows, trains and counts them", async () => {
		server ??= await startMongo();
		const model = join(root, "assets", "model");
		const env = {
			ARL_DB_CONNECTION_STRING: server.uriOf(newDatabase()),
			PATH: `${join(copy, "node_modules", ".bin")}${delimiter}${process.env.PATH}`,
		};
		const init = await runCommands(`arl init agents --template mongo --yes --model '${model}'`, copy, env);
		expect(init.code, init.text).toBe(0);
		const { scripts } = JSON.parse(readFileSync(made("agents", "package.json"), "utf8"));
		const train = `${scripts.train} --max_steps 2 --device cpu`;
		const commands = [scripts.import, scripts.check, train, scripts.status].join("\n");
		const { code, text } = await runCommands(commands, made("agents"), env);
		expect(code, text).toBe(0);
		expect(existsSync(made("agents", "out", "adapter_model.safetensors"))).toBe(true);
		// Two steps of two rows each.
		expect(text).toMatch(/^ {2}trained_count +1 4, none 2$/m);
		expect(text).toMatch(/^ {2}to train on +train 2$/m);
	}, 120_000);
});
