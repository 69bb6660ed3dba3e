import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { describe, expect, it } from "vitest";
import { isModelFile } from "../src/run/checkpoint/publish.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, contents, flags, root, sharedPath } from "./support/real.js";
import { events, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const SAVING: Options = { save_strategy: "steps", save_steps: 2 };

/** Files below `out`, by path; folders come with them. */
function put(out: string, files: Record<string, string>): void {
	for (const [name, text] of Object.entries(files)) {
		mkdirSync(dirname(join(out, name)), { recursive: true });
		writeFileSync(join(out, name), text);
	}
}

const HF_CHECKPOINT = {
	"checkpoint-500/trainer_state.json": '{"global_step": 500}',
	"checkpoint-500/optimizer.pt": "moments",
	"checkpoint-500/model.safetensors": "weights",
};

describe("another program's checkpoint in output_dir", () => {
	const holds: [string, Record<string, string>, string][] = [
		["of Hugging Face's Trainer", HF_CHECKPOINT, "checkpoint-500"],
		["that is empty", { "checkpoint-7/x": "" }, "checkpoint-7"],
		["sharded, of FSDP", { "checkpoint-2/pytorch_model_fsdp_0/__0_0.distcp": "shard" }, "checkpoint-2"],
		["that is a file", { "checkpoint-3": "all in one" }, "checkpoint-3"],
		["without its manifest", { "checkpoint-4/arl/trainer_state.json": "{}" }, "checkpoint-4"],
	];
	it.each(holds)("%s: is refused before anything is written, with the ways out", async (_, files, name) => {
		const place = workspace(folder);
		put(place.out, files);
		const before = contents(place.out);
		const wanted: Options[] = [
			{ resume_from_checkpoint: "latest" },
			{ resume_from_checkpoint: join(place.out, name) },
			{},
		];
		for (const options of wanted) {
			const error = await errorOf(trainer(place, { ...SAVING, ...options }).train());
			expect(error).toMatchObject({ code: "ARL_CONFIG", exitCode: 2 });
			expect(error.message).toBe(
				`output_dir: ${join(place.out, name)} is a checkpoint of another program: arl/manifest.json is missing`,
			);
			for (const way of ["another output_dir", "--model_name_or_path", "--overwrite_output_dir"]) {
				expect(error.hint).toContain(way);
			}
			expect(contents(place.out)).toEqual(before);
		}
	});

	it("next to this program's own is not passed over: the run would come to its step and replace it", async () => {
		const place = workspace(folder);
		await trainer(place, SAVING).train();
		put(place.out, HF_CHECKPOINT);
		const before = contents(place.out);
		const error = await errorOf(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }).train());
		expect(error.message).toContain("checkpoint-500 is a checkpoint of another program");
		expect(contents(place.out)).toEqual(before);
	});

	it("goes, when asked, with the first checkpoint of the new run, and is put back where that fails", async () => {
		const place = workspace(folder);
		put(place.out, HF_CHECKPOINT);
		const before = contents(place.out);
		const dying = fakeNative({
			onStep: () => {
				throw new Error("out of luck");
			},
		});
		await errorOf(trainer(place, { ...SAVING, overwrite_output_dir: true }, dying).train());
		const after = contents(place.out);
		for (const [name, bytes] of before) expect(after.get(name), name).toEqual(bytes);
		await trainer(place, { ...SAVING, overwrite_output_dir: true }).train();
		expect(existsSync(join(place.out, "checkpoint-500"))).toBe(false);
		expect(existsSync(join(place.out, "checkpoint-2"))).toBe(true);
	});

	it("is none where no name is that of a checkpoint: the run starts from the beginning", async () => {
		const place = workspace(folder);
		put(place.out, { "notes.txt": "mine", "logs/events.out": "x", "checkpoints/epoch_1.pt": "x" });
		const all = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		expect(ofType(all, "notice")[0]?.message).toContain("the run starts from the beginning");
		expect(readFileSync(join(place.out, "checkpoints", "epoch_1.pt"), "utf8")).toBe("x");
	});
});

describe("a model in output_dir that this program did not write there", () => {
	const models: [string, Record<string, string>, string][] = [
		["in one file", { "config.json": "{}", "model.safetensors": "w" }, "model.safetensors, config.json"],
		[
			"in shards with an index",
			{
				"config.json": "{}",
				"model-00001-of-00002.safetensors": "w",
				"model-00002-of-00002.safetensors": "w",
				"model.safetensors.index.json": "{}",
			},
			"model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, config.json and 1 more",
		],
		[
			"in PyTorch's format",
			{ "pytorch_model-00001-of-00001.bin": "w", "pytorch_model.bin.index.json": "{}" },
			"pytorch_model-00001-of-00001.bin, pytorch_model.bin.index.json",
		],
		[
			"as an adapter",
			{ "adapter_config.json": "{}", "adapter_model.safetensors": "w" },
			"adapter_model.safetensors, adapter_config.json",
		],
		[
			"without weights",
			{ "config.json": "{}", "vocab.json": "{}", "merges.txt": "" },
			"config.json, merges.txt, vocab.json",
		],
		["as templates alone", { "additional_chat_templates/tool_use.jinja": "{}" }, "additional_chat_templates"],
	];
	it.each(models)(
		"%s: is refused, and with overwrite_output_dir no file of it stays next to the new one",
		async (_, files, shown) => {
			const place = workspace(folder);
			put(place.out, { ...files, "notes.txt": "mine", "README.md": "mine too" });
			const before = contents(place.out);
			for (const options of [{}, { resume_from_checkpoint: "latest" }] as Options[]) {
				const error = await errorOf(trainer(place, { ...SAVING, ...options }).train());
				expect(error).toMatchObject({ code: "ARL_CONFIG", exitCode: 2 });
				expect(error.message).toBe(
					`output_dir: ${place.out} holds a model that this program did not write there (${shown})`,
				);
				expect(error.hint).toMatch(/away/);
				expect(contents(place.out)).toEqual(before);
			}
			await trainer(place, { overwrite_output_dir: true }).train();
			const left = readdirSync(place.out).filter((name) => !name.startsWith("."));
			const own = ["config.json", "metrics.jsonl", "model.safetensors", "report.html", "run.json"];
			expect(left.sort()).toEqual(["README.md", ...own, "notes.txt"].sort());
			expect(readFileSync(join(place.out, "config.json"), "utf8")).toContain("qwen3");
		},
	);

	it("put there after the run had ended is not replaced by a run that resumes", async () => {
		const place = workspace(folder);
		await trainer(place, SAVING).train();
		put(place.out, { "adapter_model.safetensors": "w" });
		const error = await errorOf(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }).train());
		expect(error.message).toContain("adapter_model.safetensors");
		expect(error.hint).not.toContain("--overwrite_output_dir");
	});

	it("leaves the names that loaders read to loaders: other files are nobody's model", () => {
		for (const name of ["notes.txt", "README.md", ".gitattributes", "model.py", "train.jsonl", "training_args.bin"]) {
			expect(isModelFile(name), name).toBe(false);
		}
	});
});

describe("what a process that was killed while it published a model has left", () => {
	it("is removed by the next start, second names of large files included", async () => {
		const place = workspace(folder);
		await trainer(place, SAVING).train();
		const leftovers = [".model.safetensors.partial", ".config.json.partial", ".tokenizer.json.partial"];
		for (const name of leftovers) writeFileSync(join(place.out, name), "half");
		mkdirSync(join(place.out, ".model.partial"));
		writeFileSync(join(place.out, ".mine.partial"), "mine");
		const all = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }));
		const removed = ofType(all, "removed").map(({ path, reason }) => `${path} ${reason}`);
		const expected = [...leftovers, ".model.partial"].map((name) => `${join(place.out, name)} unfinished`);
		expect(removed.sort()).toEqual(expected.sort());
		const left = readdirSync(place.out).filter((name) => name.endsWith(".partial"));
		expect(left).toEqual([".mine.partial"]);
	});
});

describe("the shared cases", () => {
	const words = (out: string, rows: string, more: Record<string, string | number | boolean>) =>
		flags({
			model_name_or_path: join(root, "assets", "model"),
			train_file: rows,
			output_dir: out,
			max_steps: 2,
			...more,
		});

	it("foreign-checkpoint: the other program's state is still there", async () => {
		const rows = sharedPath("cases/foreign-checkpoint/rows.jsonl", "foreign-checkpoint");
		if (rows === null) return;
		const out = join(mkdtempSync(join(folder, "case-")), "out");
		cpSync(join(root, "assets", "model"), join(out, "checkpoint-2"), { recursive: true });
		cpSync(join(dirname(rows), "trainer_state.json"), join(out, "checkpoint-2", "trainer_state.json"));
		const ended = await arl(["train", ...words(out, rows, { save_steps: 2, resume_from_checkpoint: "latest" })]);
		expect(ended.code).toBe(2);
		expect(ended.stderr).toContain("arl/manifest.json is missing");
		expect(existsSync(join(out, "checkpoint-2", "trainer_state.json"))).toBe(true);
	});

	it("output-holds-a-model: refused, and replaced when asked", async () => {
		const rows = sharedPath("cases/output-holds-a-model/rows.jsonl", "output-holds-a-model");
		if (rows === null) return;
		const out = join(mkdtempSync(join(folder, "case-")), "out");
		cpSync(join(root, "assets", "model"), out, { recursive: true });
		put(out, { "model-00001-of-00001.safetensors": "w", "model.safetensors.index.json": "{}" });
		const refused = await arl(["train", ...words(out, rows, {})]);
		expect(refused.code).toBe(2);
		expect(refused.stderr).toContain("holds a model that this program did not write there");
		const ended = await arl(["train", ...words(out, rows, { overwrite_output_dir: true, init_from_config: true })]);
		expect(ended.code, ended.stderr).toBe(0);
		const weights = readdirSync(out).filter((name) => name.includes("safetensors"));
		expect(weights).toEqual(["model.safetensors"]);
	});
});
