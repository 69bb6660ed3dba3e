/** Rows and models of the Hugging Face Hub in commands and in a run, from a small Hub on loopback. */
import { cpSync, mkdirSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeEach, describe, expect, it, vi } from "vitest";
import { main } from "../src/cli/commands.js";
import type { ArlError } from "../src/errors.js";
import { localArgs, rowFiles } from "../src/hub/index.js";
import { temporaryFolder } from "./support/folder.js";
import { FakeHub } from "./support/hub.js";
import { capturedOutput } from "./support/output.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();
const output = capturedOutput();
const hub = await FakeHub.start();
const row = (n: number) =>
	`{"messages": [{"role": "user", "content": "${n}?"}, {"role": "assistant", "content": "${n}."}]}\n`;
const repo = hub.add("datasets/arl/rows", {
	"README.md": "# rows",
	"data/train-00000-of-00002.jsonl": row(1) + row(2),
	"data/train-00001-of-00002.jsonl": row(3) + row(4),
	"data/test.jsonl": row(5) + row(6),
	"more/a.jsonl": row(7),
	"more/deep/b.jsonl": row(8),
	"more/picture.png": "x",
});
const model = Object.fromEntries(
	readdirSync(join(root, "assets", "model")).map((name) => [name, readFileSync(join(root, "assets", "model", name))]),
);
hub.add("models/arl/quick", model);

let caches = 0;
let cache = "";
beforeEach(() => {
	hub.calm();
	cache = join(folder, `cache-${++caches}`);
	vi.stubEnv("HF_HOME", cache);
	for (const name of ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"]) vi.stubEnv(name, "");
	vi.stubEnv("HF_ENDPOINT", hub.url);
	vi.stubEnv("NO_PROXY", "127.0.0.1");
});
afterAll(() => vi.unstubAllEnvs());

const snapshot = () => join(cache, "hub", "datasets--arl--rows", "snapshots", repo.commit);
const fetched = () =>
	readdirSync(snapshot(), { recursive: true, encoding: "utf8" })
		.filter((path) => /\.\w+$/.test(path))
		.sort();
const failure = (entry: string): Promise<ArlError> =>
	rowFiles([entry]).then(
		() => {
			throw new Error("it was fetched");
		},
		(error: ArlError) => error,
	);

describe("rows of a data set", () => {
	it("are a file, which the cache has from then on", async () => {
		const url = "hf://datasets/arl/rows/data/test.jsonl";
		const { entries, notices } = await rowFiles([url, "local.jsonl"]);
		expect(entries).toEqual([join(snapshot(), "data/test.jsonl"), "local.jsonl"]);
		expect(notices).toEqual([
			`${url}: 1 file at commit ${repo.commit.slice(0, 12)}, 0.0 MB of it fetched from ${hub.url}`,
		]);
		expect(readFileSync(entries[0] ?? "", "utf8")).toBe(row(5) + row(6));
		expect(fetched()).toEqual(["data/test.jsonl"]);
		hub.calm();
		expect((await rowFiles([url])).entries[0]).toBe(entries[0]);
		expect(hub.seen).toEqual([]);
	});

	it("are the files of a folder, or those that match a pattern, and no others", async () => {
		expect((await rowFiles(["hf://datasets/arl/rows/data/"])).entries).toEqual([join(snapshot(), "data")]);
		expect(fetched()).toEqual([
			"data/test.jsonl",
			"data/train-00000-of-00002.jsonl",
			"data/train-00001-of-00002.jsonl",
		]);
		const pattern = "hf://datasets/arl/rows@main/more/**/*.jsonl";
		expect((await rowFiles([pattern])).entries).toEqual([join(snapshot(), "more/**/*.jsonl")]);
		expect(fetched().filter((path) => path.startsWith("more"))).toEqual(["more/a.jsonl", "more/deep/b.jsonl"]);
		vi.stubEnv("HF_HUB_OFFLINE", "1");
		expect((await rowFiles(["hf://datasets/arl/rows/data"])).entries).toEqual([join(snapshot(), "data")]);
		expect((await failure("hf://datasets/arl/others/a.jsonl")).message).toContain("is not in the cache");
	});

	it("that do not exist are named, and so is a URL that names none", async () => {
		expect(await failure("hf://datasets/arl/rows/data/tset.jsonl")).toMatchObject({
			code: "ARL_NETWORK",
			message: "arl/rows: there is no data/tset.jsonl at revision main",
		});
		expect(await failure("hf://datasets/arl/rows/nowhere/x.jsonl")).toMatchObject({ code: "ARL_NETWORK" });
		expect((await failure("hf://datasets/arl/rows@v2/data/test.jsonl")).message).toBe('arl/rows has no revision "v2"');
		expect((await failure("hf://datasets/arl/none/x.jsonl")).message).toContain("has no data set arl/none");
		expect(await failure("hf://datasets/arl/rows/more/*.csv")).toMatchObject({ code: "ARL_DATA" });
		expect(await failure("hf://datasets/arl")).toMatchObject({ code: "ARL_DATA" });
		expect(await failure("hf://datasets/arl/rows/../../x")).toMatchObject({ code: "ARL_DATA" });
	});

	it("that are held out keep the name of their figures", async () => {
		const args = {
			model_name_or_path: join(root, "assets", "model"),
			train_file: [],
			eval_file: ["web=hf://datasets/arl/rows/data/test.jsonl", "hf://datasets/arl/rows/more", "own.jsonl"],
		};
		const found = await localArgs(args, { weights: true });
		expect(found.args.eval_file).toEqual([
			`web=${join(snapshot(), "data/test.jsonl")}`,
			`more=${join(snapshot(), "more")}`,
			"own.jsonl",
		]);
	});
});

describe("a run", () => {
	const out = join(folder, "out");
	const NAMED = ["--model_name_or_path", "arl/quick", "--train_file", "hf://datasets/arl/rows/data/train-*.jsonl"];

	it("trains a model and rows by their names, and holds no token", async () => {
		vi.stubEnv("HF_TOKEN", "hf_secretOfARun");
		const words = [...NAMED, "--eval_file", "hf://datasets/arl/rows/data/test.jsonl", "--output_dir", out];
		expect(
			await main(["train", ...words, "--max_steps", "4", "--save_steps", "2", "--device", "cpu", "--disable_tqdm"]),
		).toBe(0);
		expect(output.stderr).toMatch(/note: arl\/quick \(main, commit \w+\): fetched 1\.5 MB from http/);
		const files = readdirSync(out, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
		for (const { parentPath, name } of files) {
			expect(readFileSync(join(parentPath, name)).includes("hf_secretOfARun")).toBe(false);
		}
		expect(output.stderr).not.toContain("hf_secret");
		expect(readFileSync(join(out, "run.json"), "utf8")).toContain('"arl/quick"');
		expect(hub.seen.length).toBeGreaterThan(0);
	}, 120_000);

	it("resumes without the Hub and without its cache: the checkpoint has the model", async () => {
		const copy = join(folder, "copy");
		cpSync(out, copy, { recursive: true });
		mkdirSync(cache, { recursive: true });
		vi.stubEnv("HF_HUB_OFFLINE", "1");
		const local = join(folder, `cache-${caches - 1}`, "hub", "datasets--arl--rows", "snapshots", repo.commit, "data");
		const rows = ["--train_file", join(local, "train-*.jsonl"), "--eval_file", join(local, "test.jsonl")];
		const words = ["--model_name_or_path", "arl/quick", ...rows, "--output_dir", copy];
		const resume = [
			"--resume_from_checkpoint",
			join(copy, "checkpoint-2"),
			"--max_steps",
			"4",
			"--save_steps",
			"2",
			"--device",
			"cpu",
			"--disable_tqdm",
		];
		const code = await main(["train", ...words, ...resume]);
		expect(output.stderr).toContain("note: model_name_or_path: arl/quick is not in the cache");
		expect({ code, said: output.stderr }).toEqual({ code: 0, said: expect.stringContaining("resuming after step 2") });
	}, 120_000);

	it("of an adapter names its base as the Hub does, so that other machines find it", async () => {
		const adapter = join(folder, "adapter");
		const words = [...NAMED, "--output_dir", adapter, "--use_peft", "--max_steps", "1", "--device", "cpu"];
		expect(await main(["train", ...words, "--disable_tqdm"])).toBe(0);
		const config = JSON.parse(readFileSync(join(adapter, "adapter_config.json"), "utf8"));
		expect(config.base_model_name_or_path).toBe("arl/quick");
	}, 60_000);

	it("and every look at one takes names: plan, inspect, data check", async () => {
		expect(await main(["plan", "--model_name_or_path", "arl/quick", "--device", "cpu", "--max_length", "64"])).toBe(0);
		expect(await main(["inspect", ...NAMED, "--row", "1"])).toBe(0);
		expect(output.stdout).toContain("1?");
		expect(await main(["data", "check", ...NAMED])).toBe(0);
		expect(output.stdout).toContain("4 rows of");
		// None of them needs weights.
		expect(hub.contents.filter(({ url }) => url.endsWith(".safetensors"))).toEqual([]);
	}, 60_000);

	it("and so do models that answer: eval and generate", async () => {
		const heldOut = "hf://datasets/arl/rows/data/test.jsonl";
		const named = ["--model_name_or_path", "arl/quick"];
		expect(await main(["eval", ...named, "--eval_file", heldOut, "--device", "cpu"])).toBe(0);
		expect(output.stdout).toMatch(/^2 rows of /);
		const few = ["--max_new_tokens", "2", "--device", "cpu"];
		expect(await main(["generate", ...named, "--prompt", "Hello", ...few])).toBe(0);
		expect(await main(["generate", ...named, "--prompt_file", heldOut, ...few])).toBe(0);
		expect(output.stderr).toContain("arl/quick (main, commit");
		// Each was fetched once, by the first command.
		const weights = hub.contents.filter(({ url }) => url.endsWith(".safetensors"));
		expect(weights).toHaveLength(1);
	}, 60_000);

	it("says in one line what is wrong with a name", async () => {
		expect(await main(["plan", "--model_name_or_path", "arl/qiuck", "--device", "cpu"])).toBe(1);
		expect(output.stderr).toMatch(
			/^ARL_NETWORK http:\/\/\S+ has no model arl\/qiuck that can be read without a token\n {2}what to do: /,
		);
	});
});
