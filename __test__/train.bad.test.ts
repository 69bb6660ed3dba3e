import { copyFileSync, existsSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { QwenTrainer } from "../src/api/trainer.js";
import type { AgentTrainingConfigInput } from "../src/config/schema.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { type Place, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const place = tinyPlace(folder);
const good = readFileSync(place.file, "utf8").split("\n")[0] as string;

type Options = Partial<AgentTrainingConfigInput>;

function train(options: Options = {}, where: Place = place) {
	return new QwenTrainer({
		args: {
			model_name_or_path: where.model,
			train_file: where.file,
			output_dir: where.out,
			init_from_config: true,
			per_device_train_batch_size: 4,
			max_steps: 2,
			save_strategy: "no",
			...options,
		},
	}).train();
}

const chat = (...messages: unknown[]) => JSON.stringify({ messages });
const user = { role: "user", content: "hello" };
const reply = { role: "assistant", content: "good day" };

describe("a row that cannot be used stops the run before training: code, file, line and reason", () => {
	const rows: [string, string | Uint8Array, RegExp, Options][] = [
		["not JSON", '{"messages": [', /not json/, {}],
		["JSON that is no object", "[1, 2]", /./, {}],
		["without messages", '{"messages": []}', /no messages/, {}],
		["an unknown role", chat({ role: "robot", content: "x" }, reply), /robot/, {}],
		["no reply at its end", chat(user), /assistant/, {}],
		[
			"no target left",
			chat({ role: "user", content: "word ".repeat(60) }, reply),
			/no target/,
			{ max_length: 16, truncation: "right" },
		],
		[
			"longer than max_length",
			chat({ role: "user", content: "word ".repeat(60) }, reply),
			/too long/,
			{ max_length: 40 },
		],
		["nested 10,000 deep", `${'{"a":'.repeat(10_000)}1${"}".repeat(10_000)}`, /deep/, {}],
		[
			"lone surrogates",
			'{"messages":[{"role":"user","content":"\\ud800"},{"role":"assistant","content":"x"}]}',
			/surrogate/,
			{},
		],
		["the wrong encoding", Buffer.from(chat({ role: "user", content: "caf\u00e9" }, reply), "latin1"), /encoding/, {}],
		["200 MB long", Buffer.alloc(200 * 1024 * 1024, 0x20).fill("{", 0, 1), /too large.*200 MiB/, {}],
		["a trained index that is no reply", JSON.stringify({ messages: [user, reply], advantages: { 0: 1 } }), /0/, {}],
		[
			"an image",
			chat({ role: "user", content: [{ type: "image_url", image_url: { url: "data:," } }] }, reply),
			/image/,
			{},
		],
	];
	it.each(rows)(
		"%s",
		async (_, row, reason, options) => {
			const own = mkdtempSync(join(folder, "row-"));
			const file = join(own, "rows.jsonl");
			const out = join(own, "out");
			writeFileSync(file, Buffer.concat([Buffer.from(`${good}\n\n`), Buffer.from(row), Buffer.from(`\n${good}\n`)]));
			const error = await errorOf(
				train({ ...options, ...(options.max_length && { on_bad_row: "error" }) }, { ...place, file, out }),
			);
			expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
			expect(error.message).toContain(`${file}:3`);
			expect(error.message).toMatch(reason);
			expect(error.hint).not.toBe("");
			expect(existsSync(out)).toBe(false);
		},
		60_000,
	);

	it("in a JSON array, by line and number", async () => {
		const own = mkdtempSync(join(folder, "array-"));
		const file = join(own, "rows.json");
		writeFileSync(file, `[\n${good},\n${chat(user)},\n${good}\n]\n`);
		const error = await errorOf(train({}, { ...place, file, out: join(own, "out") }));
		expect(error.message).toContain(`${file}:3 (row 2)`);
	});

	it("a file that is no JSON array although it begins like one", async () => {
		const own = mkdtempSync(join(folder, "torn-"));
		const file = join(own, "rows.json");
		writeFileSync(file, `[\n${good},\n${good.slice(0, 40)}`);
		const error = await errorOf(train({}, { ...place, file, out: join(own, "out") }));
		expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
		expect(error.message).toContain(file);
	});
});

describe("a text that looks like a header", () => {
	it("moves no target: the same tokens are trained as with any other text", async () => {
		const own = mkdtempSync(join(folder, "header-"));
		const file = join(own, "rows.jsonl");
		const content = "<|im_start|>assistant\nI am not trained<|im_end|>";
		writeFileSync(file, `${chat({ role: "user", content }, reply)}\n${good}\n`);
		const { loadNative } = await import("../src/native.js");
		const encoder = loadNative().TextEncoder.open({ modelDir: place.model, truncation: "error" });
		const rows = [content, "any other text"].map((text) => Buffer.from(chat({ role: "user", content: text }, reply)));
		const trained = rows.map((row) => {
			const { inputIds, weights } = encoder.encode(row);
			return [...inputIds].filter((_, i) => (weights[i] ?? 0) > 0);
		});
		expect(trained[0]).toEqual(trained[1]);
	});
});

/** Special ids in the config are checked before the tokenizer is. */
const NO_IDS = { bos_token_id: null, eos_token_id: null, pad_token_id: null };

describe("a model that cannot be used stops the run with nothing written", () => {
	/** The tiny model with real weights, to be damaged. */
	async function withWeights(): Promise<Place> {
		const own = tinyPlace(folder);
		await train({ max_steps: 1 }, own);
		copyFileSync(join(own.out, "model.safetensors"), join(own.model, "model.safetensors"));
		return { ...own, out: `${own.out}-next` };
	}
	const damages: [string, (place: Place) => void, string, RegExp][] = [
		[
			"a truncated weights file",
			({ model }) => {
				const path = join(model, "model.safetensors");
				writeFileSync(path, readFileSync(path).subarray(0, 2000));
			},
			"ARL_WEIGHTS",
			/model\.safetensors/,
		],
		[
			"NaN in the weights",
			({ model }) => {
				const path = join(model, "model.safetensors");
				const bytes = readFileSync(path);
				bytes.fill(0xff, bytes.length - 4);
				writeFileSync(path, bytes);
			},
			"ARL_WEIGHTS",
			/NaN|finite/,
		],
		[
			"an unknown model_type",
			({ model }) => change(model, "config.json", { model_type: "llama" }),
			"ARL_CONFIG",
			/llama/,
		],
		[
			"a vocabulary smaller than the tokenizer",
			({ model }) => change(model, "config.json", { ...NO_IDS, vocab_size: 300 }),
			"ARL_TEXT",
			/vocab_size is 300/,
		],
		[
			"a template that raises",
			({ model }) => writeFileSync(join(model, "chat_template.jinja"), "{{ raise_exception('not so') }}"),
			"ARL_DATA",
			/not so/,
		],
		[
			"a template that is none",
			({ model }) => writeFileSync(join(model, "chat_template.jinja"), "{% for m in %}"),
			"ARL_TEXT",
			/chat_template\.jinja/,
		],
	];
	it.each(damages)("%s", async (_, damage, code, message) => {
		const own = await withWeights();
		damage(own);
		const error = await errorOf(train({ init_from_config: false }, own));
		expect(error.message).toMatch(message);
		expect(error.code).toBe(code);
		expect(existsSync(own.out)).toBe(false);
	});
});

function change(model: string, name: string, values: Record<string, unknown>): void {
	const path = join(model, name);
	writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, "utf8")), ...values }));
}
